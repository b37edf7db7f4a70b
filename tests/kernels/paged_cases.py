"""Sequences in shuffled pages for kernels of paged attention, and what they must give."""

import random
from typing import Any

import torch

from autodeploy.ops import attention, cached_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
FACTS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"sliding_window": 5},
    {"sliding_window": 150},
    {"chunk_size": 7},
    {"sliding_window": 9, "chunk_size": 130},
    {"softcap": 2.0},
    {"has_sinks": True},
    {"has_slopes": True},
    {"has_slopes": True, "has_sinks": True, "sliding_window": 150, "softcap": 2.0},
]


class Case:
    """Sequences with keys and values already in shuffled pages up to their last `counts` tokens."""

    def __init__(
        self,
        lengths: list[int],
        counts: list[int],
        *,
        heads: tuple[int, int] = (4, 2),
        widths: tuple[int, int] = (16, 16),
        page_size: int = 4,
        dtype: torch.dtype = torch.float32,
        has_sinks: bool = False,
        has_slopes: bool = False,
        **facts: Any,
    ):
        (num_heads, num_kv_heads), (head_dim, value_dim) = heads, widths
        self.lengths, self.counts, self.dtype = lengths, counts, dtype
        # Queries, keys and values are columns of one row, as the fused projection leaves them.
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * value_dim]
        self.rows = [torch.randn(1, length, sum(sizes)).to(dtype) for length in lengths]
        self.shapes = [(num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_dim)]
        self.sizes = sizes
        self.facts = {
            "sinks": torch.randn(num_heads).to(dtype) if has_sinks else None,
            "scale": head_dim**-0.5,
            "causal": True,
            "sliding_window": None,
            "chunk_size": None,
            "softcap": None,
            "slopes": torch.rand(num_heads) / 8 if has_slopes else None,
            "distance_logits": None,
        } | facts
        pages_each = max(-(-length // page_size) for length in lengths)
        numbers = list(range(1, len(lengths) * pages_each + 1))
        random.Random(0).shuffle(numbers)
        self.page_table = torch.tensor(numbers, dtype=torch.int32).view(len(lengths), pages_each)
        shape = (len(numbers) + 1, page_size, num_kv_heads)
        self.key_cache = torch.full((*shape, head_dim), float("nan"), dtype=dtype)
        self.value_cache = torch.full((*shape, value_dim), float("nan"), dtype=dtype)
        self.slots = [
            torch.tensor([int(table[i // page_size]) * page_size + i % page_size for i in range(length)]).long()
            for table, length in zip(self.page_table, lengths, strict=True)
        ]
        for row, slots, length, count in zip(self.rows, self.slots, lengths, counts, strict=True):
            _, key, value = self.split(row[:, : length - count])
            self.key_cache.flatten(0, 1)[slots[: length - count]] = key[0]
            self.value_cache.flatten(0, 1)[slots[: length - count]] = value[0]

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        parts = row.split(self.sizes, -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def arguments(self) -> dict[str, Any]:
        sequences = zip(self.rows, self.slots, self.counts, strict=True)
        new = [(row[:, row.shape[1] - count :], slots[len(slots) - count :]) for row, slots, count in sequences]
        query, key, value = self.split(torch.cat([row for row, _ in new], dim=1))
        return {
            "query": query,
            "key": key,
            "value": value,
            "cu_seqlens": torch.tensor([0, *self.counts]).cumsum(0).to(torch.int32),
            **self.facts,
            "seq_lens": torch.tensor(self.lengths, dtype=torch.int32),
            "page_table": self.page_table,
            "slot_mapping": torch.cat([slots for _, slots in new]),
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
        }

    def check(self, provider: str = "cpu", *, tolerance: float | None = None) -> None:
        tolerance = TOLERANCE[self.dtype] if tolerance is None else tolerance
        arguments = self.arguments()
        kernel = cached_attention.kernels[provider]
        assert kernel.supports(**arguments) is None
        result = kernel.function(**arguments).float()
        # Whole sequences in float32, from the stateless op.
        whole = [
            attention.reference(
                *(part.float() for part in self.split(row)),
                torch.tensor([0, row.shape[1]], dtype=torch.int32),
                **{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in self.facts.items()},
            )
            for row in self.rows
        ]
        expected = torch.cat([w[:, w.shape[1] - n :] for w, n in zip(whole, self.counts, strict=True)], dim=1)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def mla_arguments(
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
