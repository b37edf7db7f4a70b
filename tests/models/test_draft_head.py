"""Draft heads, a user's own and from checkpoints in the published layouts: captured, run beside the model, of use."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import parse_options
from autodeploy.debug.packed_run import Span, fresh_states, step_batch
from autodeploy.errors import CheckpointError, ConfigError, UnsupportedModelError
from autodeploy.runtime.engine import Engine, EngineStats
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.draft_heads import fit, make_predictable, small_head
from tests.engines import generated

GREEDY = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
HIDDEN = tiny.HIDDEN


def program_with(model: nn.Module | str, speculation: dict[str, Any] | None, **options: Any) -> Program:
    values = {"speculative_config": speculation, "check_isolation": False, "compile_backend": "torch-simple"}
    return build(model, parse_options(values | options))


def run(program: Program, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], EngineStats]:
    """What is generated for each, the first of them once before the others; the engine has seen its prefix then."""
    params = options.pop("params", GREEDY)
    engine = Engine(program, parse_options({"page_size": 4, "max_num_seqs": 32, **options}).engine, tiny.MAX_LENGTH)
    return generated(engine, prompts[:1], params) + generated(engine, prompts, params), engine.stats()


@functools.cache
def fitted(name: str) -> tuple[PreTrainedModel, Program, Program, nn.Module]:
    """A model, its program, its program with a head, and that head, fitted to what the model generates."""
    model = make_predictable({**tiny.TINY, **tiny.HYBRID}[name]())
    plain = program_with(model, None)
    prompts = tiny.prompts(24, seed=1, shortest=4, longest=8)
    outputs = run(plain, prompts)[0][1:]
    rows = torch.tensor([(prompt + output)[:50] for prompt, output in zip(prompts, outputs, strict=True)])
    head = fit(small_head(HIDDEN), model, rows, steps=60)
    return model, plain, program_with(model, {"method": "eagle", "model": head}), head


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_a_fitted_head_yields_several_tokens_a_step_and_the_same_ones(name: str) -> None:
    """Attention, and a hybrid whose recurrent states go back; in chunks, and behind prefixes that are known."""
    _, plain, with_head, head = fitted(name)
    common = tiny.prompts(1, seed=5, shortest=24, longest=24)[0]
    prompts = [[*common, at] for at in range(3)] + tiny.prompts(3, seed=2, shortest=4, longest=12)
    expected, _ = run(plain, prompts)
    _, lookup = run(plain, prompts, speculative_config={"method": "ngram"})
    config = {"method": "eagle", "model": head}
    for options in ({}, {"max_num_batched_tokens": 16}):
        tokens, stats = run(with_head, prompts, speculative_config=config, **options)
        assert tokens == expected
        assert stats.acceptance_length > 3 and stats.acceptance_length > lookup.acceptance_length + 2
        assert stats.prefix_cache_hit_tokens > 0


def test_an_unfitted_head_is_of_no_use_and_does_no_harm() -> None:
    model, plain, _, _ = fitted("llama")
    head = small_head(HIDDEN, seed=5)
    prompts = tiny.prompts(3, seed=2, shortest=4, longest=12)
    config = {"method": "eagle", "model": head}
    tokens, stats = run(program_with(model, config), prompts, speculative_config=config)
    assert tokens == run(plain, prompts)[0]
    assert stats.num_drafts > 0 and stats.acceptance_length < 1.5


@pytest.mark.parametrize("params", [{"temperature": 0.9, "seed": 5}, {"temperature": 0.7, "seed": 6, "top_p": 0.9}])
def test_sampled_tokens_are_those_without_drafts(params: dict[str, Any]) -> None:
    _, plain, with_head, head = fitted("llama")
    prompts = tiny.prompts(3, seed=7, shortest=4, longest=12)
    wanted = {"params": SamplingParams(max_tokens=30, ignore_eos=True, **params)}
    tokens, stats = run(with_head, prompts, speculative_config={"method": "eagle", "model": head}, **wanted)
    assert tokens == run(plain, prompts, **wanted)[0] and stats.accepted_tokens > 0


class _Product(nn.Module):
    """A head without state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, inputs_embeds: Tensor, hidden_states: Tensor) -> Tensor:
        return self.fc(torch.cat((inputs_embeds, hidden_states), dim=-1))


def head_logits(program: Program, token_ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits of the graph `head` for one sequence, every row."""
    assert program.head is not None
    states = fresh_states(program.head.states, [token_ids], program.device)
    batch = step_batch(program.head.states, [token_ids], [Span(0, 0, len(token_ids))], program.device)
    return program.run(batch | {"hidden_states": hidden}, states, "head")


def test_ends_are_shared_with_the_model_and_any_module_will_do() -> None:
    model, head = tiny.TINY["llama"](), _Product().requires_grad_(False)
    program = program_with(model, {"method": "mtp", "model": head})
    plain = program_with(model, None)
    assert program.weight_bytes == plain.weight_bytes + sum(parameter.nbytes for parameter in head.parameters())
    token_ids, hidden = torch.arange(9), torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    guessed = head(model.get_input_embeddings()(token_ids[None]), hidden)
    expected = model.get_output_embeddings()(guessed)[0]
    torch.testing.assert_close(head_logits(program, token_ids, hidden), expected, rtol=1e-4, atol=1e-4)


def eagle_folder(folder: Path) -> tuple[Path, nn.Module]:
    head = small_head(HIDDEN)
    tensors = {name.removeprefix("body."): value for name, value in head.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config: LlamaConfig = copy.deepcopy(head.body.config)
    config.vocab_size = tiny.VOCAB_SIZE
    config.save_pretrained(folder)
    return folder, head


def test_a_head_in_a_folder_of_its_own_is_the_module_it_was(tmp_path: Path) -> None:
    folder, head = eagle_folder(tmp_path / "head")
    model = tiny.save("llama", tmp_path / "model")
    token_ids, hidden = torch.arange(9), torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    stored = program_with(str(model), {"method": "eagle", "model": str(folder)})
    live = program_with(tiny.TINY["llama"](), {"method": "eagle", "model": head})
    expected = head_logits(live, token_ids, hidden)
    torch.testing.assert_close(head_logits(stored, token_ids, hidden), expected, rtol=1e-4, atol=1e-4)


def beside(name: str) -> str:
    """Names of a head beside the model's layers; `name` is that of a part of a model with one layer."""
    known = {"model.norm.weight": "mtp.norm.weight"}
    return known.get(name, name.replace("model.layers.3.", "mtp.layers.0."))


def one_layer_more(name: str) -> str:
    """Names of a head that is the layer behind the model's three."""
    known = {
        "mtp.fc.weight": "model.layers.3.eh_proj.weight",
        "mtp.pre_fc_norm_embedding.weight": "model.layers.3.enorm.weight",
        "mtp.pre_fc_norm_hidden.weight": "model.layers.3.hnorm.weight",
        "model.norm.weight": "model.layers.3.shared_head.norm.weight",
    }
    return known.get(name, name)


@pytest.mark.parametrize("layout", [beside, one_layer_more])
def test_a_head_saved_with_the_model_is_found_there(layout: Callable[[str], str], tmp_path: Path) -> None:
    """A model of four layers lends its last layer and its last norm to a head of the one of three."""
    folder = tiny.save("llama", tmp_path)
    model = tiny.TINY["llama"]()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    donor: Any = type(model)(config).eval().requires_grad_(False)
    parts = {
        "mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.2,
        "mtp.pre_fc_norm_embedding.weight": torch.full((HIDDEN,), 0.5),
        "mtp.pre_fc_norm_hidden.weight": torch.full((HIDDEN,), 2.0),
        "model.norm.weight": torch.full((HIDDEN,), 1.5),
    }
    layer = {f"model.layers.3.{name}": value for name, value in donor.model.layers[0].state_dict().items()}
    more = {layout(name): value for name, value in (parts | layer).items()}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})

    program = program_with(str(folder), {"method": "mtp"})
    token_ids, hidden = torch.arange(9), torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    donor.model.norm.weight.copy_(parts["model.norm.weight"])
    embedded = torch.rms_norm(model.get_input_embeddings()(token_ids[None]), (HIDDEN,), None, 1e-6) * 0.5
    both = torch.cat((embedded, torch.rms_norm(hidden, (HIDDEN,), None, 1e-6) * 2.0), dim=-1)
    output = donor.model(inputs_embeds=both @ parts["mtp.fc.weight"].T).last_hidden_state
    expected = model.get_output_embeddings()(output)[0]
    torch.testing.assert_close(head_logits(program, token_ids, hidden), expected, rtol=1e-3, atol=1e-3)


def test_what_is_no_head_for_the_model_is_refused(tmp_path: Path) -> None:
    model, folder = tiny.TINY["llama"](), tiny.save("llama", tmp_path / "model")
    refused: list[tuple[Any, type[Exception], str]] = [
        ({"method": "eagle3", "model": "x"}, ConfigError, "three layers"),
        ({"method": "eagle"}, ConfigError, "must name a model"),
        ({"method": "mtp"}, ConfigError, "brings no head"),
        ({"method": "eagle", "model": str(folder)}, CheckpointError, "expected fc.weight, found"),
        ({"method": "eagle", "model": _Product().double()}, ConfigError, "convert the head"),
        ({"method": "eagle", "model": nn.Linear(3, 3)}, ConfigError, "inputs_embeds and hidden_states"),
    ]
    for speculation, kind, message in refused:
        with pytest.raises(kind, match=message):
            program_with(model, speculation)
    with pytest.raises(CheckpointError, match=r"expected mtp.fc.weight or model.layers.3.eh_proj.weight"):
        program_with(str(folder), {"method": "mtp"})
    other, _ = eagle_folder(tmp_path / "head")
    save_file({"fc.weight": torch.ones(2), "d2t": torch.ones(2)}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="vocabulary of its own"):
        program_with(str(folder), {"method": "eagle", "model": str(other)})


def test_a_model_that_hides_its_ends_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(8, HIDDEN), nn.Linear(HIDDEN, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.output(self.embedding(input_ids))

    with pytest.raises(UnsupportedModelError, match="does not say which modules"):
        program_with(Plain(), {"method": "eagle", "model": _Product()})
