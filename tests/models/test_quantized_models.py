"""Quality: how far rounded weights move a real model's distributions, in nats of KL divergence from float32.

The text is Python's own language reference, which ships with every Python.
"""

import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from autodeploy.build import build
from autodeploy.config import ModelOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.models.resolve import resolve_model

NUM_TOKENS, NUM_ROWS = 160, 3
TEXT_CHARACTERS = 20_000

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def folder(smollm2: Path) -> Path:
    return resolve_model(str(smollm2), ModelOptions(dtype="bfloat16")).folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Tensor]:
    text = "\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARACTERS]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids)
    return list(tokens[: NUM_TOKENS * NUM_ROWS].split(NUM_TOKENS))


def _log_probabilities(folder: Path, rows: list[Tensor], quantization: str | None) -> Tensor:
    options = {"dtype": "float32", "check_isolation": False, "quantization": quantization}
    program = build(str(folder), parse_options(options))
    assert ("quantized_linear" in program.report.kernels) == (quantization is not None)
    return run_packed(program, rows).log_softmax(-1)


@pytest.fixture(scope="module")
def exact(folder: Path, rows: list[Tensor]) -> Tensor:
    return _log_probabilities(folder, rows, None)


def _perplexity(log_probabilities: Tensor, rows: list[Tensor]) -> float:
    """Of each next token, rows apart."""
    chosen = [
        part[:-1].gather(1, row[1:, None]) for part, row in zip(log_probabilities.split(NUM_TOKENS), rows, strict=True)
    ]
    return math.exp(-float(torch.cat(chosen).mean()))


@pytest.mark.parametrize(("quantization", "top_agreement"), [("int8", 0.9), ("int4", 0.9)])
def test_divergence_from_float32(
    folder: Path, rows: list[Tensor], exact: Tensor, quantization: str, top_agreement: float
) -> None:
    """Both are below 0.01 nats. int4 keeps this model so well because its weights come from a file of 4-bit groups with
    offsets, which are found again; that a grid is found again is what is tested here.
    """
    rounded = _log_probabilities(folder, rows, quantization)
    divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    agreement = float((rounded.argmax(-1) == exact.argmax(-1)).float().mean())
    worse = _perplexity(rounded, rows) / _perplexity(exact, rows)
    print(f"{quantization}: {divergence:.5f} nats, {agreement:.3f} of the top tokens agree, perplexity x {worse:.4f}")
    assert 1e-4 < divergence < 0.01
    assert agreement > top_agreement
    assert 0.97 < worse < 1.03
