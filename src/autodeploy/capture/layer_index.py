"""LayerIndex: a layer's own number, as an integer that tells when the layer's code looks at it.

In: the members of a module list. Out: the attributes that number them, and stand-ins for their values. Passing the
number on, as models do to their cache, is no use of it; comparing it, computing with it and indexing by it are.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_USES = (
    *("index", "int", "float", "bool", "hash", "str", "format", "round", "neg", "pos", "abs", "invert"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *_ARITHMETIC,
    *(f"r{name}" for name in _ARITHMETIC),
)


class LayerIndex:
    """Behaves like the number it stands for, and calls `used` first, unless the code at work is this package's own."""

    def __init__(self, number: int, used: Callable[[], None]):
        self._number, self._used = number, used


def _use(name: str) -> Callable[..., Any]:
    def method(self: LayerIndex, *others: Any) -> Any:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("autodeploy."):
            self._used()
        others = tuple(other._number if isinstance(other, LayerIndex) else other for other in others)
        return getattr(self._number, name)(*others)

    return method


for _name in _USES:
    setattr(LayerIndex, f"__{_name}__", _use(f"__{_name}__"))


def index_attributes(members: nn.ModuleList) -> set[tuple[str, str]]:
    """Attributes that number the members: integers at a constant distance to the position, in all that have them.

    Returns:
        pairs of a path inside a member and a name, such as `("self_attn", "layer_idx")`.
    """
    distances: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, member in enumerate(members):
        for path, module in member.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    distances[path, name].append(value - position)
    return {key for key, found in distances.items() if len(found) > 1 and len(set(found)) == 1}
