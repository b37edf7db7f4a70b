"""The tiny models deserve trust: the same every time, sensitive to context, unharmed by saving, fluent in bytes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_same_model_every_time(name: str) -> None:
    first, second = tiny.TINY[name](), tiny.TINY[name]()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not first.training
    assert first.dtype == torch.float32


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_last_logits_depend_on_earlier_tokens_and_their_order(name: str) -> None:
    model = tiny.TINY[name]()
    ids = torch.tensor(tiny.prompts(1, seed=1, shortest=30))
    changed, swapped = ids.clone(), ids.clone()
    changed[0, -5] = (changed[0, -5] + 1) % tiny.BOS
    swapped[0, [-4, -3]] = swapped[0, [-3, -4]]
    reference = model(ids).logits[0, -1]
    # In units of the logits' own spread, which differs between architectures.
    for other in (changed, swapped):
        difference = (model(other).logits[0, -1] - reference).abs().max() / reference.std()
        assert difference > 0.05


@pytest.mark.parametrize("name", tiny.TINY)
def test_greedy_output_is_no_single_token_repeated(name: str) -> None:
    model = tiny.TINY[name]()
    produced = set()
    for prompt in tiny.prompts(4, seed=2):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        produced.update(output[0, len(prompt) :].tolist())
    assert len(produced) >= 6


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_saving_loses_nothing(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / name)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(tiny.prompts(1, shortest=30))
    torch.testing.assert_close(loaded(ids).logits, tiny.TINY[name]()(ids).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tiny.EOS


def test_the_tokenizer_keeps_every_character() -> None:
    tokenizer = tiny.tokenizer()
    text = "naïve 日本語 👩‍👩‍👧 \x00\n\t"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < tiny.BOS
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
