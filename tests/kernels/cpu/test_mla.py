"""cached_mla over pages of latents: against the reference, odd sizes, many heads, long contexts, bad batches."""

from typing import Any

import pytest
import torch

from autodeploy.compile.replay import Memory, record
from autodeploy.kernels.cpu import mla
from autodeploy.ops import cached_mla
from tests.kernels.paged_cases import mla_arguments as arguments

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2}


def check(given: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    assert cached_mla.kernels["cpu"].supports(**given) is None
    wide = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    wide["latent_cache"] = wide["latent_cache"].clone()
    expected = cached_mla.reference(**wide)
    result = mla.cached_mla_cpu(**given)
    assert (result.shape, result.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(result.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(given["latent_cache"].float(), wide["latent_cache"])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_steps_and_a_few_tokens(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(mla, "num_threads", lambda work, least: threads)
    check(arguments([1, 127, 128, 300, 40], [1, 1, 2, 5, 0], dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_long_chunk(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(arguments([60, 9], [50, 1], dtype=dtype), dtype)


@pytest.mark.parametrize("heads", [1, 3, 17, 33])
@pytest.mark.parametrize("widths", [(5, 4, 9, 7), (16, 8, 64, 16), (20, 6, 130, 30), (128, 64, 512, 128)])
def test_sizes(widths: tuple[int, int, int, int], heads: int) -> None:
    torch.manual_seed(0)
    check(arguments([140, 9], [1, 2], widths=widths, heads=heads, page_size=16))


def test_a_repeated_step_makes_one_native_call() -> None:
    given = arguments([30, 9], [1, 1])
    step, _ = record(lambda: mla.cached_mla_cpu(**given), (), (), Memory())
    assert (step.tape.num_native, step.tape.num_python) == (1, 0)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"slot_mapping": torch.tensor([5, 10**6])}, "outside the cache"),
        ({"slot_mapping": torch.tensor([5, -1])}, "outside the cache"),
        ({"slot_mapping": torch.tensor([5])}, "do not fit"),
        ({"page_table": torch.full((2, 8), 99, dtype=torch.int32)}, "outside the cache"),
        ({"seq_lens": torch.tensor([30, 33], dtype=torch.int32)}, "do not fit"),
        ({"cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32)}, "do not fit"),
    ],
)
def test_contradictions_are_refused(fault: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(IndexError, match=says):
        mla.cached_mla_cpu(**arguments([30, 9], [1, 1]) | fault)


def test_what_is_not_written_in_it_is_refused_with_the_reason() -> None:
    given = arguments([30, 9], [1, 1])
    assert "torch.int64" in (cached_mla.kernels["cpu"].supports(**given | {"seq_lens": torch.tensor([30, 9])}) or "")
    assert "dtypes differ" in (cached_mla.kernels["cpu"].supports(**given | {"up": given["up"].bfloat16()}) or "")
