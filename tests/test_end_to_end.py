"""From a checkpoint folder to text: generate, chat, streaming, both runtimes, both backends, a module."""

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from autodeploy import LLM, SamplingParams
from tests import tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = ["the cat", "a dog and a cat sat", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("gemma3_text", tmp_path_factory.mktemp("model") / "tiny")


def _tokens(llm: LLM, prompts: list[str]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """What transformers generates."""
    model, tokenizer = tiny.TINY["gemma3_text"](), tiny.tokenizer()
    with torch.no_grad():
        return [
            model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, ids.shape[1] :
            ].tolist()
            for ids in (tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS)
        ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"runtime": "demollm"},
        {"compile_backend": "torch-compile"},
        {"attn_backend": "torch"},
        {"max_num_batched_tokens": 4, "max_num_seqs": 2, "page_size": 2},
        {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1}},
    ],
    ids=str,
)
def test_every_way_to_serve_gives_transformers_tokens(
    folder: Path, expected: list[list[int]], options: dict[str, object]
) -> None:
    with LLM(str(folder), max_model_len=64, **options) as llm:
        assert _tokens(llm, PROMPTS) == expected


def test_a_model_that_drafts_for_itself_is_always_right(folder: Path, expected: list[list[int]]) -> None:
    with LLM(str(folder), max_model_len=64, speculative_config={"model": str(folder)}) as llm:
        assert _tokens(llm, PROMPTS) == expected
        # After a prompt come seven tokens: a draft of four and the token behind it, then one of one.
        assert llm.stats().acceptance_length == 1 + (4 + 1) / 2 and llm.stats().draft_tokens == 3 * 5


def test_text_is_the_decoded_tokens(folder: Path) -> None:
    with LLM(str(folder), max_model_len=64) as llm:
        (result,) = llm.generate("the cat", GREEDY, use_tqdm=False)
        (output,) = result.outputs
        assert output.text == llm.get_tokenizer().decode(output.token_ids, skip_special_tokens=True)
        assert result.prompt == "the cat" and result.finished and output.finish_reason == "length"


def test_streaming_adds_up_to_the_whole(folder: Path) -> None:
    async def stream(llm: LLM) -> list[str]:
        return [part.outputs[0].text async for part in llm.generate_async("the cat", GREEDY, streaming=True)]

    with LLM(str(folder), max_model_len=64) as llm:
        texts = asyncio.run(stream(llm))
        whole = llm.generate("the cat", GREEDY, use_tqdm=False)[0].outputs[0].text
    assert len(texts) > 1 and texts[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_token_ids_in_and_out_need_no_tokenizer(folder: Path, expected: list[list[int]]) -> None:
    ids = tiny.tokenizer()(PROMPTS[0]).input_ids
    with LLM(str(folder), max_model_len=64, skip_tokenizer_init=True) as llm:
        (output,) = llm.generate({"prompt_token_ids": ids}, GREEDY, use_tqdm=False)[0].outputs
        assert list(output.token_ids) == expected[0] and output.text == ""


def test_a_module_is_served_like_a_checkpoint(folder: Path, expected: list[list[int]]) -> None:
    with LLM(tiny.TINY["gemma3_text"](), tokenizer=str(folder), max_model_len=64) as llm:
        assert _tokens(llm, PROMPTS) == expected


def test_random_weights_of_a_config_alone(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with LLM(str(tmp_path), load_format="dummy", max_model_len=64) as llm:
        assert all(len(tokens) == 8 for tokens in _tokens(llm, PROMPTS))
