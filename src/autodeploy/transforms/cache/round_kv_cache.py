"""RoundKVCache: keys, values and latents are kept in 8-bit floating point, half the bytes of bfloat16."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from autodeploy.errors import ConfigError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.state import PagedState

DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Dtypes by the name that users give."""


@dataclass(frozen=True, kw_only=True)
class RoundKVCache(Transform):
    """`key_cache: bfloat16`  becomes  `key_cache: float8_e4m3fn`, where the op that has it converts. Changes numbers on
    purpose.

    Entries are stored as they are, without a scale. States in slots and those that others read stay as they are.

    Attributes:
        dtype: a name in `DTYPES`.
    """

    enabled: bool = False
    dtype: str = "fp8"

    # Two bits of fraction move a model of one layer by a third; what is wrong altogether, by more than half.
    tolerance: ClassVar[Mapping[torch.dtype, float]] = dict.fromkeys(Transform.tolerance, 0.5)

    def apply(self, graph: ModelGraph) -> TransformResult:
        sites = [spec for spec in graph.states if isinstance(spec, PagedState) and spec.may_be_rounded]
        if not sites:
            raise ConfigError(
                f"kv_cache_dtype={self.dtype!r} is for the pages of keys and values, which this model has not"
                f" ({len(graph.states)} other states); leave it out"
            )
        dtype = DTYPES[self.dtype]
        for spec in sites:
            node = graph.input(spec.name)
            assert node is not None
            with graph.fake_mode:
                node.meta["val"] = torch.empty_like(node.meta["val"], dtype=dtype)
        graph.states[:] = [dataclasses.replace(spec, dtype=dtype) if spec in sites else spec for spec in graph.states]
        return TransformResult(found=len(sites), rewritten=len(sites), expected=len(sites))
