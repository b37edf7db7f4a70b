"""A matrix product seen as letters, whichever op computes it: `matmul`, `bmm`, `baddbmm`, `einsum`.

Letters name dimensions as in einsum. Attention is two such products with a softmax between them, and a model may keep
batch, heads and tokens in any order.
"""

import string
from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """`out = alpha * left @ right + beta * addend`, summed over the letters that `out` lacks.

    Attributes:
        left, right: the factors.
        letters: one string of letters for left, right and the result.
        addend: what is added to the product, or None.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    letters: tuple[str, str, str]
    addend: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0

    @staticmethod
    def of(node: fx.Node) -> "Contraction | None":
        """The contraction a node computes, or None."""
        args = node.args
        if node.target in (aten.matmul.default, aten.bmm.default):
            return _of_matrices(node, args[0], args[1])
        if node.target == aten.baddbmm.default and isinstance(args[0], fx.Node):
            found = _of_matrices(node, args[1], args[2])
            alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
            if found is None or not isinstance(alpha, int | float) or not isinstance(beta, int | float):
                return None
            return Contraction(node, found.left, found.right, found.letters, args[0], float(alpha), float(beta))
        if node.target == aten.einsum.default:
            return _of_einsum(node)
        return None


def _of_matrices(node: fx.Node, left: object, right: object) -> Contraction | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    ranks = [factor.meta["val"].dim() for factor in (left, right)]
    if min(ranks) < 2:
        return None
    leading = string.ascii_letters[: max(ranks) - 2]
    own = [leading[len(leading) - rank + 2 :] for rank in ranks]
    return Contraction(node, left, right, (own[0] + "yz", own[1] + "zx", leading + "yx"))


def _of_einsum(node: fx.Node) -> Contraction | None:
    equation, factors = node.args[:2]
    if not isinstance(factors, list | tuple) or len(factors) != 2 or "->" not in str(equation) or "." in str(equation):
        return None
    terms, out = str(equation).replace(" ", "").split("->")
    left, right = terms.split(",")
    if any(len(set(letters)) != len(letters) for letters in (left, right, out)):
        return None
    return Contraction(node, factors[0], factors[1], (left, right, out))  # type: ignore[arg-type]


def rearranged(graph: ModelGraph, node: fx.Node, letters: str, wanted: str, before: fx.Node) -> fx.Node:
    """A node with dimensions `letters` as one with dimensions `wanted`; a letter it lacks becomes a size of 1."""
    for missing in (letter for letter in wanted if letter not in letters):
        node, letters = graph.call(aten.unsqueeze.default, node, 0, before=before), missing + letters
    order = [letters.index(letter) for letter in wanted]
    moved = [dim for dim, source in enumerate(order) if dim != source]
    if not moved:
        return node
    if len(moved) == 2:  # a pair of transposes that undo each other is dropped later
        return graph.call(aten.transpose.int, node, *moved, before=before)
    return graph.call(aten.permute.default, node, order, before=before)
