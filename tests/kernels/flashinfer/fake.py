"""A stand-in for the package flashinfer: the parts of its API that are used, by torch, with all plans written down."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.attention import attend

HEAD_DIMS = (64, 128, 256)


@dataclass
class Recorded:
    """What wrappers were asked for, in order."""

    plans: list[dict[str, Any]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


class _Wrapper:
    """Keeps a plan, and runs by it alone: of a layer it sees queries and pages."""

    name = ""
    recorded: Recorded

    def __init__(self, workspace: Tensor, layout: str, **options: Any) -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8 and not workspace.any()
        self.options, self.current = options, {}

    def _keep(self, borders: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, *sizes: int, **given: Any) -> None:
        for tensor in (borders, indptr, indices, last):
            assert tensor.dtype == torch.int32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        num_heads, num_kv_heads, head_dim, page_size = sizes
        assert len(indptr) == len(borders) == len(last) + 1 and indptr[-1] == len(indices)
        assert num_heads % num_kv_heads == 0 and head_dim in HEAD_DIMS
        assert ((last >= 1) & (last <= page_size)).all()
        assert given["q_data_type"] in (torch.float16, torch.bfloat16)
        numbers = {"qo_indptr": borders, "indptr": indptr, "indices": indices, "last_page_len": last}
        lists = {name: tensor.tolist() for name, tensor in numbers.items()}
        self.current = {"wrapper": self.name, **self.options, **lists, "sizes": sizes, **given}
        self.recorded.plans.append(self.current)

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        plan = self.current
        num_heads, num_kv_heads, head_dim, page_size = plan["sizes"]
        assert query.shape[1:] == (num_heads, head_dim) and query.stride(-1) == 1
        assert all(part.shape[1:] == (page_size, num_kv_heads, head_dim) for part in cache)
        assert query.dtype == plan["q_data_type"] and cache[0].dtype == plan["kv_data_type"]
        self.recorded.runs.append(self.name)
        out = torch.full_like(query, torch.nan)
        for at, last in enumerate(plan["last_page_len"]):
            row = slice(plan["qo_indptr"][at], plan["qo_indptr"][at + 1])
            pages = plan["indices"][plan["indptr"][at] : plan["indptr"][at + 1]]
            length = (len(pages) - 1) * page_size + last
            key, value = (part[pages].flatten(0, 1)[:length] for part in cache)
            window = None if plan["window_left"] < 0 else plan["window_left"] + 1
            facts = (None, plan["sm_scale"], plan["causal"], window, None, plan["logits_soft_cap"], None, None)
            out[row] = attend(query[row], key, value, *facts)
        return out


class _Decode(_Wrapper):
    name = "decode"

    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *sizes: int, **given: Any) -> None:
        borders = torch.arange(len(indptr), dtype=torch.int32)
        self._keep(borders, indptr, indices, last_page_len, *sizes, causal=True, **given)


class _Prefill(_Wrapper):
    name = "prefill"

    def plan(self, *numbers: Any, causal: bool, **given: Any) -> None:
        self._keep(*numbers, causal=causal, **given)


def _rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    assert x.dim() == 2 and x.dtype == weight.dtype
    numbers = x.float()
    return out.copy_(numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + eps) * weight.float())


def module() -> tuple[ModuleType, Recorded]:
    """A module to put in the place of flashinfer, and what it writes down."""
    recorded = Recorded()
    made: Any = ModuleType("flashinfer")
    made.BatchDecodeWithPagedKVCacheWrapper = type("Decode", (_Decode,), {"recorded": recorded})
    made.BatchPrefillWithPagedKVCacheWrapper = type("Prefill", (_Prefill,), {"recorded": recorded})
    made.rmsnorm = _rmsnorm
    return made, recorded
