"""Attention whose queries and outputs are products of chosen experts: without sorting the tokens by expert.

Why: the module sorts all tokens by expert and takes the sizes of the groups out of torch (`tolist`), which mixes tokens
    ("aten.sort.default mixes tokens") and makes the graph grow with the number of experts. It is called by its methods
    `map` and `reduce`, between which the attention runs, so that no recording of a forward can stand in for it.
Versions: transformers 5.17 to 5.23.
Remove when: these experts go through transformers' experts interface.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from autodeploy.ops.moe import expert_linear


def _map(self: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    flat = layer_input.reshape(-1, layer_input.shape[-1])
    logits = self.router.layer(flat).float()
    values, chosen = logits.topk(self.top_k, dim=1)
    queries = expert_linear(flat[:, None], chosen, self.input_linear.weight, None)
    return queries.view(*layer_input.shape[:-1], self.top_k, -1), logits, (chosen, values.softmax(1).type_as(flat))


def _reduce(self: Any, layer_input: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    chosen, gates = routing
    outputs = expert_linear(layer_input.flatten(0, 1), chosen, self.output_linear.weight, None)
    total: Tensor = (outputs * gates[..., None]).sum(1).view(*layer_input.shape[:2], -1) + self.bias
    return total


@contextlib.contextmanager
def patch() -> Iterator[None]:
    namespace: Any = sys.modules.get("transformers.models.jetmoe.modeling_jetmoe")
    if namespace is None:
        yield
        return
    experts = namespace.JetMoeMoA
    before = experts.map, experts.reduce
    experts.map, experts.reduce = _map, _reduce
    try:
        yield
    finally:
        experts.map, experts.reduce = before
