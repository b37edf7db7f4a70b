"""THE list: every transform, in order, on one page."""

import dataclasses
import difflib
from typing import Any

import torch

from autodeploy.config import INDUCTOR_BACKENDS, CompileOptions
from autodeploy.errors import ConfigError
from autodeploy.graph.levels import Level
from autodeploy.graph.transform import Pipeline, Stage, Transform
from autodeploy.kernels.provider import invariant_priority, mixer_priority, priority
from autodeploy.transforms.cache.gather_logits import GatherLogits
from autodeploy.transforms.cache.insert_cached_ops import InsertCachedOps
from autodeploy.transforms.cache.keep_hidden_states import KeepHiddenStates
from autodeploy.transforms.cache.round_kv_cache import RoundKVCache
from autodeploy.transforms.canonicalize.bind_boundaries import BindBoundaries
from autodeploy.transforms.canonicalize.drop_no_ops import DropNoOps
from autodeploy.transforms.canonicalize.fold_weights import FoldWeights
from autodeploy.transforms.canonicalize.match_attention import MatchAttention
from autodeploy.transforms.canonicalize.match_causal_conv import MatchCausalConv
from autodeploy.transforms.canonicalize.match_dense_experts import MatchDenseExperts
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from autodeploy.transforms.canonicalize.match_mla import MatchMLA
from autodeploy.transforms.canonicalize.match_norm import MatchNorm
from autodeploy.transforms.canonicalize.match_recurrences import MatchRecurrences
from autodeploy.transforms.canonicalize.match_token_shift import MatchTokenShift
from autodeploy.transforms.canonicalize.match_token_window import MatchTokenWindow
from autodeploy.transforms.canonicalize.roll_loops import RollLoops
from autodeploy.transforms.canonicalize.use_position_ids import UsePositionIds
from autodeploy.transforms.fuse.fuse_add_rms_norm import FuseAddRMSNorm
from autodeploy.transforms.fuse.fuse_gate_up import FuseGateUp
from autodeploy.transforms.fuse.fuse_gated_norm_casts import FuseGatedNormCasts
from autodeploy.transforms.fuse.fuse_qkv import FuseQKV
from autodeploy.transforms.lower.assign_streams import AssignStreams
from autodeploy.transforms.lower.fuse_rope_attention import FuseRopeAttention
from autodeploy.transforms.lower.place_on_device import PlaceOnDevice
from autodeploy.transforms.lower.select_kernels import SelectKernels
from autodeploy.transforms.quantize.quantize_weights import QuantizeWeights


def default_pipeline(device: torch.device, select_kernels: SelectKernels | None = None) -> Pipeline:
    """From captured to lowered.

    Args:
        device: where the program runs.
        select_kernels: how kernels are chosen; default: the reference everywhere.
    """
    return Pipeline(
        (
            # One node per token mixer, norm and product; masks become facts, positions come from position_ids.
            Stage(
                "canonicalize",
                (
                    RollLoops(),
                    MatchRecurrences(),
                    MatchTokenShift(),
                    MatchTokenWindow(),
                    MatchCausalConv(),
                    BindBoundaries(),
                    MatchAttention(),
                    UsePositionIds(),
                    MatchDenseExperts(),
                    MatchLinear(),
                    MatchMLA(),
                    FoldWeights(),
                    MatchNorm(),
                    DropNoOps(),
                ),
                ensures=Level.CANONICAL,
            ),
            # Fewer, larger ops. Weight recipes change with the graph, before any weight is read.
            Stage(
                "fuse",
                (FuseQKV(), FuseGateUp(), FuseGatedNormCasts(), FuseAddRMSNorm()),
                ensures=Level.CANONICAL,
            ),
            # Whole-sequence mixers become their twins over state; the head runs for wanted rows only.
            Stage("cache", (KeepHiddenStates(), InsertCachedOps(), GatherLogits()), ensures=Level.CACHED),
            # Fused weights, and what is kept of tokens, with fewer bits, where they are wanted.
            Stage("quantize", (QuantizeWeights(), RoundKVCache()), ensures=Level.CACHED),
            # The device, a kernel provider for every op, one call where it can do two in one, and what may run side by
            # side, where that is wanted.
            Stage(
                "lower",
                (
                    PlaceOnDevice(device=device),
                    select_kernels or SelectKernels(),
                    FuseRopeAttention(),
                    AssignStreams(device=device),
                ),
                ensures=Level.LOWERED,
            ),
        )
    )


def configure(pipeline: Pipeline, options: CompileOptions) -> Pipeline:
    """The pipeline with the user's options, and overrides by transform name.

    Raises:
        ConfigError: no such transform or no such option of it, with the nearest known name.
    """
    known = pipeline.transforms()
    for name, values in options.transforms.items():
        if name not in known:
            raise ConfigError(f"no transform is called {name!r}{_nearest(name, list(known))}")
        fields = [field.name for field in dataclasses.fields(known[name])]
        for option in values:
            if option not in fields:
                raise ConfigError(f"transform {name!r} has no option {option!r}{_nearest(option, fields)}")

    overrides: dict[str, dict[str, Any]] = {name: dict(values) for name, values in options.transforms.items()}
    if options.quantization is not None:
        wanted = {"enabled": True, "format": options.quantization, "group_size": options.quantization_group_size}
        overrides[QuantizeWeights.name()] = wanted | overrides.get(QuantizeWeights.name(), {})

    if options.kv_cache_dtype != "auto":
        wanted = {"enabled": True, "dtype": options.kv_cache_dtype}
        overrides[RoundKVCache.name()] = wanted | overrides.get(RoundKVCache.name(), {})

    def override(transform: Transform) -> Transform:
        values = overrides.get(transform.name())
        return dataclasses.replace(transform, **values) if values else transform

    return Pipeline(
        tuple(dataclasses.replace(s, transforms=tuple(map(override, s.transforms))) for s in pipeline.stages)
    )


def _nearest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"


def kernel_choice(device: torch.device, options: CompileOptions) -> SelectKernels:
    """How kernels are chosen for a device under these options.

    Raises:
        ConfigError: an attention backend that there is not.
    """
    if options.batch_invariant:
        return SelectKernels(priority=invariant_priority(device), batch_invariant=True)
    of_device, mixers = priority(device), mixer_priority(device, options.attn_backend)
    return SelectKernels(
        priority=(*of_device, *(name for name in mixers if name not in of_device)),
        mixer_priority=mixers,
        compiled=options.compile_backend in INDUCTOR_BACKENDS,
    )
