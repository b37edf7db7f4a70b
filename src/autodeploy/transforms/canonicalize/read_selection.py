"""What an indexer does, read off by running it: from the indices a model attends to, to the indexer's own operands.

The indices are the best of a row of scores. The part of the graph from the product of index queries and index keys to
those scores is run on random numbers, and must be one of the forms that `ops.sparse_attention.index_scores` has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import count_token_dims, token_symbol
from autodeploy.ops.sparse_attention import index_scores
from autodeploy.transforms.canonicalize.contraction import Contraction, rearranged
from autodeploy.transforms.canonicalize.evaluate import (
    NotEvaluable,
    evaluate,
    is_evaluable,
    shape_at,
)
from autodeploy.transforms.canonicalize.mask_probe import LENGTHS, MaskRefused

aten = torch.ops.aten

_VERY_LONG = 10**9
"""a length at which the number of chosen tokens is what it is for any long sequence"""
_MOST_LOCAL_BLOCKS = 8


@dataclass(frozen=True)
class Selection:
    """The arguments of `sparse_attention` that say what is attended to."""

    index_query: fx.Node
    index_key: fx.Node
    index_weights: fx.Node | None
    top_k: int
    local_blocks: int


@dataclass(frozen=True)
class _Indexer:
    """The indexer's product, the scores that are compared, and what else they are made of."""

    product: Contraction
    scores: fx.Node
    weights: fx.Node | None
    query: str
    key: str
    heads: str


def read_selection(graph: ModelGraph, indices: fx.Node, block_size: int, before: fx.Node) -> Selection:
    """The selection behind a node of indices.

    Raises:
        MaskRefused: the indices come from no indexer that is known.
    """
    choice = _choice(indices)
    indexer = _indexer(graph, choice)
    local_blocks = _local_blocks(graph, indexer, block_size)
    if local_blocks is None:
        raise MaskRefused("the scores of its indexer have a form that no fact expresses")
    product, letters = indexer.product, indexer.product.letters
    (dim,) = [letter for letter in letters[0] if letter not in letters[2]]
    query = rearranged(graph, product.left, letters[0], indexer.query + indexer.heads + dim, before)
    shared = "".join(letter for letter in letters[1] if letter not in (indexer.key, dim))
    key = rearranged(graph, product.right, letters[1], shared + indexer.key + dim, before)
    width, heads = product.left.meta["val"].shape[letters[0].index(dim)], _num_heads(indexer)
    if any(size != 1 for size in key.meta["val"].shape[: len(shared)]):
        raise MaskRefused("its index keys differ between index heads")
    weights = indexer.weights
    return Selection(
        graph.call(aten.reshape.default, query, [1, -1, heads, width], before=before),
        graph.call(aten.reshape.default, key, [1, -1, width], before=before),
        None if weights is None else graph.call(aten.reshape.default, weights, [1, -1, heads], before=before),
        shape_at(graph, choice.meta["val"][1], _VERY_LONG)[-1],
        local_blocks,
    )


def _choice(indices: fx.Node) -> fx.Node:
    """The topk whose indices, cast or with unused ones marked, these are."""
    node = indices
    while node.target != aten.topk.default:
        parents = node.all_input_nodes
        if not parents or node.op != "call_function":
            raise MaskRefused("the indices it attends to are not the best of any scores")
        node = parents[0]
    return node


def _indexer(graph: ModelGraph, choice: fx.Node) -> _Indexer:
    symbol, scores = token_symbol(graph), choice.args[0]
    assert isinstance(scores, fx.Node)
    products, sources = _parts(graph, scores, symbol)
    if len(products) != 1 or len(sources) > 1 or len(choice.meta["val"][1].shape) == 0:
        raise MaskRefused("the scores of its indexer are made of more than one product and weights")
    left, _, out = products[0].letters
    sizes = dict(zip(out, products[0].node.meta["val"].shape, strict=True))
    along = [letter for letter, size in sizes.items() if not isinstance(size, int)]
    if len(along) != 2 or len({letter in left for letter in along}) != 2:
        raise MaskRefused("the product of its indexer is not one of queries and keys")
    query, key = sorted(along, key=lambda letter: letter not in left)
    heads = "".join(letter for letter in out if letter not in along)
    return _Indexer(products[0], scores, sources[0] if sources else None, query, key, heads)


def _parts(graph: ModelGraph, scores: fx.Node, symbol: object) -> tuple[list[Contraction], list[fx.Node]]:
    """The products of activations behind the scores, and other inputs that depend on the tokens."""
    products: list[Contraction] = []
    sources: list[fx.Node] = []
    seen, pending = {scores}, [scores]
    while pending:
        node = pending.pop()
        product = Contraction.of(node)
        if product is not None and all(_tokens(side, symbol) == 1 for side in (product.left, product.right)):
            products.append(product)
            continue
        for parent in node.all_input_nodes:
            if parent in seen or not isinstance(parent.meta.get("val"), Tensor):
                continue
            seen.add(parent)
            if _tokens(parent, symbol) >= 2:
                pending.append(parent)
            elif not is_evaluable(graph, parent):
                sources.append(parent)
    return products, sources


def _tokens(node: fx.Node, symbol: object) -> int:
    value = node.meta.get("val")
    return count_token_dims(value, symbol) if isinstance(value, Tensor) else 0


def _num_heads(indexer: _Indexer) -> int:
    value = indexer.product.node.meta["val"]
    heads = 1
    for letter in indexer.heads:
        heads *= int(value.shape[indexer.product.letters[2].index(letter)])
    return heads


def _local_blocks(graph: ModelGraph, indexer: _Indexer, block_size: int) -> int | None:
    """How many blocks up to its own each query always attends to; None when the scores are not the op's."""
    for local_blocks in range(_MOST_LOCAL_BLOCKS if block_size > 1 else 1):
        if all(_agrees(graph, indexer, block_size, local_blocks, length) for length in LENGTHS):
            return local_blocks
    return None


def _agrees(graph: ModelGraph, indexer: _Indexer, block_size: int, local_blocks: int, length: int) -> bool:
    """The model's scores order tokens as the op's do: equal up to one positive factor, and hidden alike."""
    generator = torch.Generator().manual_seed(length)
    heads, letters = _num_heads(indexer), indexer.product.letters[2]
    query, key = torch.randn(length, heads, 6, generator=generator), torch.randn(length, 6, generator=generator)
    values = torch.einsum("qid,kd->qik", query, key)
    given: dict[fx.Node, Tensor] = {indexer.product.node: _in_layout(graph, indexer, letters, values, length)}
    weights = None
    if indexer.weights is not None:
        weights = torch.randn(length, heads, generator=generator)
        given[indexer.weights] = weights.reshape(shape_at(graph, indexer.weights.meta["val"], length))
    try:
        result: Tensor = evaluate(graph, indexer.scores, length, given)
    except NotEvaluable as error:
        raise MaskRefused(f"the scores of its indexer {error}") from error
    expected = index_scores(query, key, weights, block_size, local_blocks)
    if result.numel() != expected.numel():
        return False
    result = result.reshape(expected.shape)
    result = result.masked_fill(result <= torch.finfo(torch.float32).min / 2, -torch.inf)
    finite = expected.isfinite()
    if not torch.equal(result[~finite], expected[~finite]) or not bool(result[finite].isfinite().all()):
        return False
    factor = (result[finite] * expected[finite]).sum() / expected[finite].square().sum()
    return bool(factor > 0) and torch.allclose(result[finite], factor * expected[finite], rtol=1e-3, atol=1e-4)


def _in_layout(graph: ModelGraph, indexer: _Indexer, letters: str, values: Tensor, length: int) -> Tensor:
    """Scores `[queries, index heads, keys]` in the layout of the indexer's product."""
    sizes = dict(zip(letters, shape_at(graph, indexer.product.node.meta["val"], length), strict=True))
    own = indexer.query + indexer.heads + indexer.key
    return values.reshape([sizes[letter] for letter in own]).permute([own.index(letter) for letter in letters])
