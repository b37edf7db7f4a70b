"""LiveModel: the model's own code over pages says what the model says; what it cannot do it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodeploy.capture.live import LiveModel, NotLive
from autodeploy.compile.program import NamedGraph, Program
from autodeploy.config import EngineOptions
from autodeploy.debug.isolation import check_apart, check_isolation
from autodeploy.errors import TokenMixingError
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.engines import generated
from tests.graphs import attention_model, causal_sdpa

CROWDED = EngineOptions(max_num_batched_tokens=16, page_size=4, max_num_seqs=3)


def _program(live: LiveModel) -> Program:
    names = tuple(spec.name for spec in live.states)
    return Program(
        graphs={"text": NamedGraph("text", live, live.batch_inputs, names)},
        states=tuple(live.states),
        vocab_size=live.vocab_size,
        max_model_len=tiny.MAX_LENGTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


# Grouped heads, windows of two kinds, soft caps and sinks, learned positions.
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma2", "gpt_oss", "gpt2"])
def test_generates_what_transformers_generates(name: str) -> None:
    model = tiny.TINY[name]()
    prompts = tiny.prompts(5, seed=1)
    with torch.no_grad():
        expected = [
            model.generate(
                torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    live = LiveModel(model)
    program = _program(live)
    assert check_isolation(program) == "passed"
    check_apart(program, live.example, live.example_logits)
    engine = Engine(program, CROWDED, max_model_len=96)
    assert generated(engine, prompts, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)) == expected


def test_positions_counted_from_the_row_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.TINY["llama"]()
    forward = type(model.model).forward

    def with_positions_of_the_row(self: nn.Module, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    monkeypatch.setattr(type(model.model), "forward", with_positions_of_the_row)
    live = LiveModel(model)
    with pytest.raises(TokenMixingError, match="packed with another over two steps"):
        check_apart(_program(live), live.example, live.example_logits)


def test_windows_are_states_of_their_own_group() -> None:
    live = LiveModel(tiny.TINY["gemma2"]())
    assert len({spec.group for spec in live.states}) == 2
    assert {name for name in live.batch_inputs if name.startswith("page_table")} == {
        f"page_table_{spec.group}" for spec in live.states
    }


def test_a_users_own_module_is_refused() -> None:
    with pytest.raises(NotLive, match="does not take its attention from the interface"):
        LiveModel(attention_model(causal_sdpa))


def test_a_state_that_is_no_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.TINY["llama"]()
    forward = type(model.model).forward

    def with_another_state(self: nn.Module, *args: Any, past_key_values: Any, **kwargs: Any) -> Any:
        past_key_values.update_conv_state(torch.zeros(1, 2, 2), 0)
        return forward(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", with_another_state)
    with pytest.raises(NotLive, match="it writes states"):
        LiveModel(model)


def test_a_mask_that_is_changed_on_its_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.TINY["llama"]()
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def with_another_mask(self: nn.Module, *args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        return forward(self, *args, attention_mask=attention_mask.clone(), **kwargs)

    monkeypatch.setattr(attention, "forward", with_another_mask)
    with pytest.raises(NotLive, match="mask reaches the attention as another tensor"):
        LiveModel(model)
