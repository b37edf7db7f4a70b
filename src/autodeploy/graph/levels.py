"""Graph levels: what is true of a graph at each point of the path, as checks that run between stages.

CAPTURED   one packed row [1, T]; ATen and ops of ours; weights are recipes; nothing is updated in place
CANONICAL  every computation that mixes tokens is one op of ours; masks are facts
CACHED     no whole-sequence mixer is left; states and batch metadata are inputs; only states are updated
LOWERED    every op has a provider
"""

import enum


class Level(enum.IntEnum):
    """Levels in the order they are reached; each includes the ones before it."""

    CAPTURED = 1
    CANONICAL = 2
    CACHED = 3
    LOWERED = 4
