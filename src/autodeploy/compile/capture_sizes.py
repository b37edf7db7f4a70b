"""Sizes that graphs are captured for: limits of the runtime go in, numbers of sequences and of tokens come out."""

from collections.abc import Sequence
from dataclasses import dataclass

from autodeploy.compile.program import BatchLimits

MOST_TOKENS = 512
"""Tokens of a step up to which graphs are worth their memory; what larger steps compute hides what launching costs."""
_SMALLEST = (1, 2, 4)
_STEP = 8
_TOKEN_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MOST_TOKENS)
"""For other batches; at most a third of what a step computes is padding."""


@dataclass(frozen=True)
class CaptureSizes:
    """Sizes, largest first, which is the order to capture in: later graphs find room in what earlier ones needed.

    Attributes:
        sequences: of batches in which every sequence brings one token.
        tokens: of other batches.
    """

    sequences: tuple[int, ...]
    tokens: tuple[int, ...]

    @staticmethod
    def of(wanted: Sequence[int] | None, limits: BatchLimits, *, has_whole_steps: bool) -> "CaptureSizes":
        """Sizes within the limits.

        Args:
            wanted: sizes that the user gave; default: 1, 2, 4, multiples of 8 and the largest number of sequences; for
                other batches up to 512 tokens.
            has_whole_steps: whether batches of one token each have graphs of their own; without, they share those of
                other batches.
        """
        most_seqs = limits.max_num_seqs
        most_tokens = min(limits.max_num_batched_tokens, most_seqs * limits.max_model_len)
        sequences = wanted or (*_SMALLEST, *range(_STEP, most_seqs, _STEP), most_seqs)
        tokens = wanted or (*_TOKEN_SIZES, min(most_tokens, MOST_TOKENS))
        if not has_whole_steps and not wanted:
            tokens = (*_SMALLEST, *tokens)
        return CaptureSizes(
            _largest_first(sequences, most_seqs) if has_whole_steps else (), _largest_first(tokens, most_tokens)
        )

    @property
    def most_tokens(self) -> int:
        return max(self.tokens, default=0)

    def of_sequences(self, count: int) -> int | None:
        """The size to pad this many sequences to; None when there is none."""
        return min((size for size in self.sequences if size >= count), default=None)

    def of_tokens(self, count: int) -> int | None:
        """The size to pad this many tokens to; None when there is none."""
        return min((size for size in self.tokens if size >= count), default=None)


def _largest_first(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(sorted({size for size in sizes if size <= most}, reverse=True))
