"""cached_attention by FlashInfer: plans are made on the host, once for a step and all layers with the same facts.

What a plan says, how work is shared among the processors of the device, depends on where sequences begin and how long
they are. The runtime has these numbers on the host; where they are on the device alone, making a plan waits for them.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flashinfer
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.ops.attention import cached_attention
from autodeploy.ops.op import StepPlan

DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends for results of parts of contexts."""
_LEAST_GROUP = 4
"""Query heads of a key-value head from which tensor cores pay for single tokens."""


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Shared by all plans: kernels run one after the other."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class _Facts:
    """What layers that share a plan have in common.

    Attributes:
        page_table: name of the batch input.
        cache: name of a state in these pages, of any of the layers.
        window: tokens that a query looks back on, itself included, or None.
    """

    page_table: str
    cache: str = field(compare=False)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    causal: bool
    window: int | None
    softcap: float | None

    def start(self, device: torch.device) -> "AttentionPlan":
        return AttentionPlan(self, device)


class AttentionPlan(StepPlan):
    """The attention of all layers with the same facts."""

    def __init__(self, facts: _Facts, device: torch.device) -> None:
        self._facts, self._device = facts, device
        workspace, group = _workspace(device), facts.num_heads // facts.num_kv_heads
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=group >= _LEAST_GROUP
        )
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._planned: Any = None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._num_tokens = 0

    def prepare(self, batch: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """Plan one step from `cu_seqlens`, `seq_lens` and the page table."""
        # A wrapper keeps one buffer on the host, from which its last plan may still be copied.
        if self._copied is not None:
            self._copied.synchronize()
        facts, page_size = self._facts, states[self._facts.cache].shape[1]
        borders, lengths, table = (batch[name].cpu().numpy() for name in ("cu_seqlens", "seq_lens", facts.page_table))
        num_pages = -(-lengths // page_size)
        pages = table[:, : num_pages.max()]
        indices = pages[np.arange(pages.shape[1]) < num_pages[:, None]]
        paged = (np.append(0, num_pages.cumsum()), indices, (lengths - 1) % page_size + 1)
        self._num_tokens = int(borders[-1])
        sizes = (facts.num_heads, facts.num_kv_heads, facts.head_dim, page_size)
        given = {
            "sm_scale": facts.scale,
            "window_left": -1 if facts.window is None else facts.window - 1,
            "logits_soft_cap": facts.softcap,
            "q_data_type": facts.dtype,
            "kv_data_type": facts.dtype,
        }
        if borders[-1] == len(lengths) and (np.diff(borders) == 1).all():
            self._planned = self._decode
            self._decode.plan(*map(self._on_host, paged), *sizes, **given)
        else:
            self._planned = self._prefill
            numbers = map(self._on_host, (borders, *paged))
            self._prefill.plan(*numbers, *sizes, causal=facts.causal, **given)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        sinks: Tensor | None,
        scale: float,
        causal: bool,
        sliding_window: int | None,
        chunk_size: int | None,
        softcap: float | None,
        slopes: Tensor | None,
        distance_logits: Tensor | None,
        seq_lens: Tensor,
        page_table: Tensor,
        slot_mapping: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Tensor:
        """`cached_attention` of one layer in the step that is planned; more tokens than its are padding.

        A call for fewer belongs to no step, such as the trial run of a CUDA graph's pieces; it is planned by itself.
        """
        if self._planned is None or query.shape[1] < self._num_tokens:
            batch = {"cu_seqlens": cu_seqlens, "seq_lens": seq_lens, self._facts.page_table: page_table}
            self.prepare(batch, {self._facts.cache: key_cache})
        key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key[0])
        value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slot_mapping, value[0])
        result: Tensor = self._planned.run(query[0], (key_cache, value_cache))
        return result.unsqueeze(0)

    def _on_host(self, values: NDArray[np.integer]) -> Tensor:
        """In pinned memory where there is a device, so that no copy waits for it."""
        tensor = torch.from_numpy(values.astype(np.int32))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _facts_of(
    inputs: Mapping[str, str],
    *,
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    **_: Any,
) -> _Facts:
    return _Facts(
        page_table=inputs["page_table"],
        cache=inputs["key_cache"],
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        dtype=query.dtype,
        scale=scale,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
    )


def _supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> str | None:
    unknown = {
        "sinks": sinks,
        "chunks": chunk_size,
        "slopes": slopes,
        "logits by distance": distance_logits,
    }
    for name, fact in unknown.items():
        if fact is not None:
            return f"attention with {name}"
    if query.shape[3] not in _HEAD_DIMS or value.shape[3] != query.shape[3]:
        return (
            f"heads of {query.shape[3]} and values of {value.shape[3]}; there are kernels for {_HEAD_DIMS}, both alike"
        )
    given = {tensor.dtype for tensor in (query, key, value, key_cache, value_cache)}
    if len(given) > 1 or query.dtype not in DTYPES:
        return f"{', '.join(sorted(map(str, given)))}; there are kernels for bfloat16 and float16"
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        return "caches with gaps"
    return None


@cached_attention.kernel("flashinfer", _supports, capture_safe=False, plan_facts=_facts_of)
def cached_attention_flashinfer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """`cached_attention` with a plan for this call alone."""
    names = {"page_table": "page_table", "key_cache": "key_cache"}
    facts = _facts_of(
        names, query=query, key=key, scale=scale, causal=causal, sliding_window=sliding_window, softcap=softcap
    )
    plan = facts.start(query.device)
    plan.prepare({"cu_seqlens": cu_seqlens, "seq_lens": seq_lens, "page_table": page_table}, {"key_cache": key_cache})
    given = (query, key, value, cu_seqlens, sinks, scale, causal, sliding_window, chunk_size, softcap, slopes)
    return plan.run(*given, distance_logits, seq_lens, page_table, slot_mapping, key_cache, value_cache)
