"""cached_mla over pages of latents: against the reference, odd sizes, many heads, long contexts, bad batches."""

import random
from typing import Any

import pytest
import torch

from autodeploy.compile.replay import Memory, record
from autodeploy.kernels.cpu import mla
from autodeploy.ops import cached_mla

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2}


def arguments(
    lengths: list[int],
    counts: list[int],
    *,
    heads: int = 4,
    widths: tuple[int, int, int, int] = (16, 8, 24, 12),
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Sequences with latents in shuffled pages; `widths` of a head's own key, the shared key, the latent, a value."""
    own, shared, latent, value = widths
    tokens = sum(counts)
    pages_each = max(-(-length // page_size) for length in lengths)
    numbers = list(range(1, len(lengths) * pages_each + 1))
    random.Random(0).shuffle(numbers)
    page_table = torch.tensor(numbers, dtype=torch.int32).view(len(lengths), pages_each)
    slots = [
        int(table[at // page_size]) * page_size + at % page_size
        for table, length, count in zip(page_table, lengths, counts, strict=True)
        for at in range(length - count, length)
    ]
    # As the projections leave them: columns of wider rows.
    query = torch.randn(1, tokens, heads, own + shared + 3).to(dtype)[..., : own + shared]
    row = torch.randn(1, tokens, latent + shared).to(dtype)
    return {
        "query": query,
        "latent": row[..., :latent],
        "shared_key": row[..., latent:],
        "up": (torch.randn(heads * (own + value), latent) * latent**-0.5).to(dtype),
        "cu_seqlens": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        "scale": (own + shared) ** -0.5,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "page_table": page_table,
        "slot_mapping": torch.tensor(slots),
        "latent_cache": torch.randn(len(numbers) + 1, page_size, 1, latent + shared).to(dtype),
    }


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
