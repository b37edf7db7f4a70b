"""Random numbers: a key and a position go in, a number in [0, 1) comes out, the same one whenever it is asked for.

It is SplitMix64 (Steele, Lea and Flood, 2014): output i of the generator with seed `key` is a hash of key + i * GAMMA.
Nothing is remembered, so it does not matter when a number is drawn, beside which others, or whether it is used.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from autodeploy.ops.sampling import FIRST, GAMMA, SECOND

_BITS = 2**64 - 1


def key_of(*numbers: int) -> int:
    """A key of 64 bits for some whole numbers; of others, or of the same in another order, it is another."""
    key = 0
    for number in numbers:
        key = int(_mixed(np.array([(key + number * GAMMA + GAMMA) & _BITS], dtype=np.uint64))[0])
    return key


def uniforms(keys: Iterable[int], positions: Iterable[int], count: int) -> NDArray[np.float64]:
    """Numbers [count] in [0, 1), one for each key and its position; all 2**53 of them are equally likely."""
    states = np.fromiter(keys, np.uint64, count)
    states += (np.fromiter(positions, np.uint64, count) + np.uint64(1)) * np.uint64(GAMMA)
    return (_mixed(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    states = (states ^ (states >> np.uint64(30))) * np.uint64(FIRST)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(SECOND)
    return states ^ (states >> np.uint64(31))
