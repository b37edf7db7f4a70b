"""Tokens chosen inside a graph: parameters of rows lie at fixed addresses, and so do the tokens that come out.

The choice stands behind the logits in each graph of whole steps, and is part of every one of them. Where a row of a
step has penalties or constraints nobody looks at it, and the kernel is told to leave the logits unread.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from autodeploy.compile.program import ChooseTokens, Chosen, Draws

_POSITIONS, _ROWS = "position_ids", "logits_indices"
_NOT_LOOKED_AT = -1.0
"""Of a temperature."""


def why_not_chosen(choose: ChooseTokens | None, batch_inputs: Iterable[str]) -> str | None:
    """The reason that graphs of a step with these inputs cannot choose tokens, or None."""
    if choose is None:
        return "no kernel chooses tokens on this device"
    lacking = {_POSITIONS, _ROWS} - set(batch_inputs)
    return f"the graph reads no {', '.join(sorted(lacking))}" if lacking else None


class GraphedChoice:
    """The op `choose_tokens` over static buffers, shared by graphs of all sizes.

    Args:
        choose: a kernel of that op.
        max_rows: of logits.
    """

    def __init__(self, choose: ChooseTokens, max_rows: int, device: torch.device) -> None:
        self._choose = choose
        self._shares = torch.zeros(3, max_rows, device=device)
        self._numbers = torch.zeros(2, max_rows, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._best = torch.zeros(max_rows, device=device)
        # All rows are looked at before the first step: what is measured in trial runs is the whole work.
        self._draws: Draws | None = Draws(self._shares, self._numbers, has_filters=False)

    def choose(self, logits: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """What a graph does behind its logits `[R, V]`; its inputs have as many sequences."""
        count = len(logits)
        temperature, top_p, min_p = self._shares[:, :count]
        top_k, keys = self._numbers[:, :count]
        positions = inputs[_POSITIONS][0].index_select(0, inputs[_ROWS]) + 1
        tokens, best = self._choose(logits, temperature, top_k, top_p, min_p, keys, positions)
        self._tokens[:count].copy_(tokens)
        self._best[:count].copy_(best)

    def fill(self, draws: Draws | None) -> None:
        """Draw so in the steps that follow. Rows behind those of `draws`, all where it is None, are not looked at."""
        if draws is self._draws:
            return
        count = 0 if draws is None else draws.shares.shape[1]
        if draws is not None:
            self._shares[:, :count].copy_(draws.shares)
            self._numbers[:, :count].copy_(draws.numbers)
        self._shares[0, count:].fill_(_NOT_LOOKED_AT)
        self._draws = draws

    def chosen(self, count: int) -> Chosen:
        """What the last step chose in its first rows, the caller's to keep."""
        return self._tokens[:count].clone(), self._best[:count].clone()
