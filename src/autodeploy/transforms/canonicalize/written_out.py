"""Attention that a model writes out: `softmax(f(query @ key)) @ value`, with f and the layout read off by running them.

Between the two products a model may scale, cap, mask, add, cast, reshape or drop in any order and by any op. The part
of the graph between them is run on random scores: it has to treat each score by itself, as
`softcap(scale * score) + bias`, and the part after the softmax has to leave the weights as they are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import count_token_dims, token_symbol
from autodeploy.transforms.canonicalize.contraction import Contraction
from autodeploy.transforms.canonicalize.evaluate import NotEvaluable, evaluate, shape_at
from autodeploy.transforms.canonicalize.mask_probe import HIDDEN, LENGTHS, BiasFacts, MaskRefused, classify

aten = torch.ops.aten


@dataclass(frozen=True)
class WrittenOut:
    """One attention.

    Attributes:
        scores: the product of queries and keys.
        outside: what is combined with the scores before the softmax: masks and biases.
        output: the product of weights and values; its left factor's letters are heads, query, key.
        heads, query, key, dim: letters of `scores`.
    """

    scores: Contraction
    outside: tuple[fx.Node, ...]
    softmax: fx.Node
    output: Contraction
    heads: str
    query: str
    key: str
    dim: str


@dataclass(frozen=True)
class ScoreFacts:
    """What happens to a score before the softmax."""

    bias: BiasFacts
    scale: float
    softcap: float | None


def find_written_out(graph: ModelGraph) -> list[WrittenOut]:
    """Every softmax over a product of two activations along tokens, and the product that consumes it."""
    symbol = token_symbol(graph)
    softmaxes = graph.nodes(aten.softmax.int) + graph.nodes(aten._softmax.default)
    return [site for node in softmaxes if (site := _site(node, symbol)) is not None]


def read_scores(graph: ModelGraph, site: WrittenOut) -> ScoreFacts:
    """What the model does between the products, as facts.

    Raises:
        MaskRefused: it is none of the known forms; the message says what was seen.
    """
    zeros = {length: _scores(graph, site, torch.zeros(_shape(graph, site, length)), length) for length in LENGTHS}
    facts = classify(graph, lambda length: zeros[length], site.outside)
    scale, softcap = _response(graph, site, zeros[LENGTHS[0]])
    for length, zero in zeros.items():
        random = 3 * torch.randn(_shape(graph, site, length), generator=torch.Generator().manual_seed(length))
        result, score = _scores(graph, site, random, length), _in_rows(site, random) * scale
        expected = (score if softcap is None else softcap * torch.tanh(score / softcap)) + zero
        seen = zero > HIDDEN
        agree = torch.allclose(result[seen], expected[seen], rtol=1e-4, atol=1e-4)
        if not agree or bool((result[~seen] > HIDDEN / 2).any()):
            raise MaskRefused("its scores are changed between product and softmax in a way that no fact expresses")
        _check_weights(graph, site, result, length)
    return ScoreFacts(facts, scale, softcap)


def _site(softmax: fx.Node, symbol: object) -> WrittenOut | None:
    value = softmax.meta["val"]
    over = softmax.args[1]
    if count_token_dims(value, symbol) < 2 or not isinstance(over, int) or over % value.dim() != value.dim() - 1:
        return None
    region = _region(softmax, symbol)
    products = [product for node in region if (product := _of_activations(node, symbol)) is not None]
    output = _product_after(softmax, symbol)
    if len(products) != 1 or output is None:
        return None
    left, right, out = products[0].letters
    query = [letter for letter in left if letter in out and letter not in right]
    key = [letter for letter in right if letter in out and letter not in left]
    dim = [letter for letter in left if letter not in out]
    if [len(query), len(key), len(dim)] != [1, 1, 1]:
        return None
    heads = "".join(letter for letter in out if letter not in (query[0], key[0]))
    outside = tuple(_outside(products[0], region))
    return WrittenOut(products[0], outside, softmax, output, heads, query[0], key[0], dim[0])


def _region(softmax: fx.Node, symbol: object) -> list[fx.Node]:
    """The token-by-token matrices that the softmax's input is made of, up to products of activations, in order."""
    pending = [node for node in softmax.all_input_nodes if _tokens(node, symbol) >= 2]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if _of_activations(node, symbol) is not None:
            continue
        for parent in node.all_input_nodes:
            if parent not in seen and _tokens(parent, symbol) >= 2:
                seen.add(parent)
                pending.append(parent)
    return sorted(seen)


def _of_activations(node: fx.Node, symbol: object) -> Contraction | None:
    """A product of two factors with one token dimension each."""
    product = Contraction.of(node)
    if product is None or any(_tokens(side, symbol) != 1 for side in (product.left, product.right)):
        return None
    return product


def _product_after(softmax: fx.Node, symbol: object) -> Contraction | None:
    """The product of the weights with values, the only thing that is done with them."""
    node = softmax
    while len(node.users) == 1:
        following = next(iter(node.users))
        product = Contraction.of(following)
        if product is not None:
            left, right, out = product.letters
            fits = product.left is node and product.addend is None and _tokens(product.right, symbol) == 1
            return product if fits and left[-1] not in out and left[-1] in right and left[-2] in out else None
        node = following
    return None


def _tokens(node: fx.Node, symbol: object) -> int:
    value = node.meta.get("val")
    return count_token_dims(value, symbol) if isinstance(value, Tensor) else 0


def _outside(scores: Contraction, region: list[fx.Node]) -> list[fx.Node]:
    inside = {scores.node}
    outside = [] if scores.addend is None else [scores.addend]
    for node in region:
        if node is not scores.node and any(parent in inside for parent in node.all_input_nodes):
            inside.add(node)
            outside.extend(parent for parent in node.all_input_nodes if parent not in inside)
    return outside


def _shape(graph: ModelGraph, site: WrittenOut, length: int) -> tuple[int, ...]:
    return shape_at(graph, site.scores.node.meta["val"], length)


def _in_rows(site: WrittenOut, scores: Tensor) -> Tensor:
    """Scores in the product's own layout as `[heads, queries, keys]`."""
    order = [site.scores.letters[2].index(letter) for letter in site.heads + site.query + site.key]
    return scores.permute(order).flatten(0, -3) if scores.dim() > 2 else scores[None]


def _scores(graph: ModelGraph, site: WrittenOut, product: Tensor, length: int) -> Tensor:
    """What reaches the softmax, `[heads, queries, keys]`, when the product of queries and keys is `product`."""
    result = product * site.scores.alpha
    try:
        if site.scores.addend is not None:
            result = result + evaluate(graph, site.scores.addend, length) * site.scores.beta
        (source,) = site.softmax.all_input_nodes
        value: Tensor = evaluate(graph, source, length, {site.scores.node: result})
    except NotEvaluable as error:
        raise MaskRefused(f"its mask or bias {error}") from error
    value = value.reshape(-1, *value.shape[-2:])
    if value.shape != _in_rows(site, product).shape:
        raise MaskRefused(f"its scores reach the softmax as {list(value.shape)}, not heads by queries by keys")
    return value


def _response(graph: ModelGraph, site: WrittenOut, zero: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap, from the first score's answer to single values."""
    shape = _shape(graph, site, LENGTHS[0])

    def answer(score: float) -> float:
        change = _scores(graph, site, torch.full(shape, score), LENGTHS[0]) - zero
        return float(change[0, 0, 0])

    one, saturated = answer(1.0), answer(1e7)
    if abs(saturated) > 1e4 * abs(one) or not abs(one) < abs(saturated):
        return one, None
    return saturated * math.atanh(one / saturated), saturated


def _check_weights(graph: ModelGraph, site: WrittenOut, scores: Tensor, length: int) -> None:
    """The weights reach the product with values as the softmax made them."""
    weights = torch.softmax(scores, -1)
    made = weights.reshape(shape_at(graph, site.softmax.meta["val"], length))
    try:
        used: Tensor = evaluate(graph, site.output.left, length, {site.softmax: made})
    except NotEvaluable as error:
        raise MaskRefused(f"what is done to its weights {error}") from error
    if used.numel() != weights.numel() or not torch.allclose(used.reshape(weights.shape), weights, atol=1e-6):
        raise MaskRefused("its weights are changed between softmax and values")
