"""Program: what the compiler half hands to the runtime half, and the only thing the runtime sees of a model.

A program holds named graphs over one set of weights (`text`, and `head` where a draft head belongs to it), the state
specs those graphs need, and the batch inputs they read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autodeploy.graph.report import BuildReport
from autodeploy.ops.state import StateSpec

GraphFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class NamedGraph:
    """One executable graph. `inputs` are keyword names, batch inputs first, then states."""

    name: str
    function: GraphFunction
    batch_inputs: tuple[str, ...]
    state_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DraftHead:
    """What there is to know of the graph `head`, which drafts from the hidden states of `text`.

    It reads one more input than the batch inputs, `hidden_states` `[1, T, H]`: in the row of each token what stands in
    `hidden_state` for the token before. What it would keep for the token itself stands in `own_hidden_state`.

    Attributes:
        states: specs of the head's own states.
        hidden_state: name of the state of `text` that keeps hidden states, `[pages, page_size, H]`.
        own_hidden_state: name of the state among `states` that keeps the head's.
    """

    states: Sequence[StateSpec]
    hidden_state: str
    own_hidden_state: str


@dataclass(frozen=True, kw_only=True)
class Program:
    """A deployable model.

    Attributes:
        graphs: executable graphs by name; every program has `text`.
        states: specs of all states of `text`, allocated by the runtime as `{spec.name: tensor}`.
        vocab_size: width of the logits.
        max_model_len: longest context in tokens the model was made for, or None when it has no limit of its own.
        dtype: dtype of weights and activations.
        device: where weights live and steps run.
        weight_bytes: bytes of all parameters in their final form.
        step_weight_bytes: bytes of those that a step of one token reads: all but tables that it is looked up in, and
            experts that it does not choose.
        flops_per_token: multiply-adds times two per token in the matrix products, attention and head left out.
        flops_per_logits_row: the same for each row of logits: the head.
        eos_token_ids: ids that end a generation, from the model's generation config.
        head: of a program with a graph `head`.
        report: what the build did.
    """

    graphs: Mapping[str, NamedGraph]
    states: Sequence[StateSpec]
    vocab_size: int
    max_model_len: int | None
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int = 0
    step_weight_bytes: int = 0
    flops_per_token: int = 0
    flops_per_logits_row: int = 0
    eos_token_ids: tuple[int, ...] = ()
    head: DraftHead | None = None
    report: BuildReport = field(default_factory=BuildReport)

    def batch_inputs(self, graph: str = "text") -> tuple[str, ...]:
        """Names of the batch inputs this graph reads (see `ops/batch_inputs.py`)."""
        return self.graphs[graph].batch_inputs

    @torch.inference_mode()
    def run(self, batch: Mapping[str, Tensor], states: Mapping[str, Tensor], graph: str = "text") -> Tensor:
        """Run one step of a named graph; states are updated in place.

        Args:
            batch: every name in `batch_inputs(graph)`; other names are ignored.
            states: every state tensor by spec name.
        Returns:
            Logits `[R, vocab_size]` in the program's dtype, one row per entry of `logits_indices`.
        """
        chosen = self.graphs[graph]
        inputs = [batch[name] for name in chosen.batch_inputs]
        inputs += [states[name] for name in chosen.state_names]
        return chosen.function(*inputs)
