"""MatchCausalConv: one-dimensional convolutions that only look back become ops with a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.causal_conv import causal_conv
from autodeploy.ops.token_shift import token_shift
from autodeploy.transforms.canonicalize.loop_runs import is_num_tokens
from autodeploy.transforms.canonicalize.match_token_shift import pad_of_zeros

aten = torch.ops.aten


@dataclass(frozen=True)
class _Signal:
    """A tensor along tokens, and what of it stands before the first token.

    Attributes:
        rows: `[1, C, T]`, its values at the row's tokens.
        lead: positions of the model's tensor that stand before the first token.
        fill: the value of each of those, `[C]`; None means zeros.
    """

    rows: fx.Node
    lead: int
    fill: fx.Node | None


@dataclass(frozen=True, kw_only=True)
class MatchCausalConv(Transform):
    """`conv1d(x, w, b, padding=K-1)[..., :T]` and `conv1d(pad(x, (K-1, 0)), w, b)`  become  `causal_conv(x, w, b)`.

    Grouped and dilated convolutions become `token_shift`s and a product within each token's window. A second one on
    the result of a first, both fed by one padding, starts from what the first gives on zeros: its bias.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        nodes = graph.nodes(aten.conv1d.default)
        signals: dict[fx.Node, _Signal] = {}
        refused = []
        for node in nodes:
            refusal = self._rewrite(graph, node, signals)
            if refusal is not None:
                refused.append(f"{node.name} {refusal}")
        return TransformResult(
            found=len(nodes), rewritten=len(nodes) - len(refused), expected=len(nodes), refused=tuple(refused)
        )

    def _rewrite(self, graph: ModelGraph, node: fx.Node, signals: dict[fx.Node, _Signal]) -> str | None:
        """Rewrite one convolution, or say why not; one that looks further back than its tokens joins `signals`."""
        x, weight, bias, stride, padding, dilation, groups = _arguments(node)
        size = (weight.meta["val"].shape[-1] - 1) * dilation
        signal = signals.get(x) or _signal(graph, x)
        if signal is None or stride != 1:
            return "does not run along the row's tokens one by one"
        if signal.fill is not None and padding:
            return "pads what a first convolution made of a padding"
        lead = signal.lead + padding - size
        if lead < 0:
            return "looks ahead: there is less padding before the tokens than taps"
        rows = _emit(graph, node, signal, dilation, groups)
        if lead > 0:
            if signal.fill is not None:
                return "is the second of three or more on one padding"
            signals[node] = _Signal(rows, lead, bias)
        wanted = rows.meta["val"].shape
        for user in [node, *node.users]:
            if user is node and padding:
                continue  # its right end holds positions after the last token, which a slice drops
            if (
                lead == 0
                and [str(s) for s in user.meta["val"].shape] == [str(s) for s in wanted]
                and _keeps_start(user)
            ):
                user.replace_all_uses_with(rows)
        return None


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, int, int, int, int]:
    defaults: list[Any] = [None, [1], [0], [1], 1]
    arguments: list[Any] = list(node.args)
    x, weight, *rest = arguments
    bias, stride, padding, dilation, groups = [*rest, *defaults[len(rest) :]]
    return x, weight, bias, stride[0], padding[0], dilation[0], groups


def _keeps_start(node: fx.Node) -> bool:
    """The convolution itself, or a slice of it from the first position on."""
    return node.target == aten.conv1d.default or (node.target == aten.slice.Tensor and node.args[2] in (0, None))


def _signal(graph: ModelGraph, x: fx.Node) -> _Signal | None:
    if is_num_tokens(graph, x.meta["val"].shape[-1]):
        return _Signal(x, 0, None)
    padding = pad_of_zeros(x) if x.target in (aten.pad.default, aten.constant_pad_nd.default) else None
    if padding is None:
        return None
    source, dim, before, after = padding
    is_last = dim == source.meta["val"].dim() - 1
    if not is_last or before < 0 or after != 0 or not is_num_tokens(graph, source.meta["val"].shape[-1]):
        return None
    return _Signal(source, before, None)


def _emit(graph: ModelGraph, node: fx.Node, signal: _Signal, dilation: int, groups: int) -> fx.Node:
    """The convolution's values at the row's tokens, `[1, C, T]`."""
    _, weight, bias, *_ = _arguments(node)
    channels, per_group, taps = weight.meta["val"].shape
    x = graph.call(aten.transpose.int, signal.rows, 1, 2, before=node)
    if per_group == 1 and groups == channels and dilation == 1 and signal.fill is None:
        filters = graph.call(aten.squeeze.dim, weight, 1, before=node)
        rows = graph.call(causal_conv, x, filters, bias, None, None, before=node)
        return graph.call(aten.transpose.int, rows, 1, 2, before=node)
    distances = [dilation * (taps - 1 - tap) for tap in range(taps)]
    window = [graph.call(token_shift, x, d, signal.fill, None, before=node) if d else x for d in distances]
    stacked = graph.call(aten.stack.default, window, -1, before=node)
    tokens = graph.call(aten.squeeze.dim, stacked, 0, before=node)  # [T, C, K]: each token is a signal of its own
    values = graph.call(aten.conv1d.default, tokens, weight, bias, [1], [0], [1], groups, before=node)
    return graph.call(aten.permute.default, values, [2, 1, 0], before=node)
