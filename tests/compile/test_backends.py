"""Compile backends: both give the original model's logits, at sizes they were not traced with."""

import pytest
import torch

from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.debug.packed_run import run_packed
from tests import tiny


@pytest.mark.parametrize("backend", ["torch-simple", "torch-compile"])
@pytest.mark.parametrize("lengths", [[1], [9], [3, 1, 12]], ids=str)
def test_logits_equal_the_models(backend: str, lengths: list[int], programs: dict[str, object]) -> None:
    model, built = programs[backend]  # type: ignore[misc]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    result = run_packed(built, rows)
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def programs() -> dict[str, object]:
    model = tiny.TINY["qwen3"]()
    return {
        backend: (model, build(model, parse_options({"compile_backend": backend})))
        for backend in ("torch-simple", "torch-compile")
    }
