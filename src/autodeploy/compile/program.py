"""Program: what the compiler half hands to the runtime half, and the only thing the runtime sees of a model.

A program holds named graphs over one set of weights (`text`, and `head` where a draft head belongs to it), the state
specs those graphs need, and the batch inputs they read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from autodeploy.graph.report import BuildReport
from autodeploy.ops.op import StepPlan
from autodeploy.ops.state import StateSpec

GraphFunction = Callable[..., Tensor]
ChooseTokens = Callable[..., tuple[Tensor, Tensor]]
AcceptDrafts = Callable[..., Tensor]
"""The ops of these names, or kernels of them."""
Chosen = tuple[Tensor, Tensor]
"""Tokens, int64 `[R]`, and the greatest logit of each row, float32 `[R]`."""
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """The largest steps that a runtime will ask for.

    Attributes:
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step.
        max_model_len: tokens of one sequence.
        page_size: tokens per page.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int

    @property
    def max_pages(self) -> int:
        """Pages of one sequence: the widest page table."""
        return -(-self.max_model_len // self.page_size)


class Preparation(Protocol):
    """What a graph does before it serves, where its backend prepares anything: CUDA graphs are captured."""

    def reserved_bytes(self, limits: BatchLimits) -> int:
        """Memory of the device, in bytes, that `prepare` will take beside states; found by a trial without any."""

    def prepare(self, states: Mapping[str, Tensor], limits: BatchLimits, progress: Progress) -> None:
        """Make ready for steps over these states and within these limits; holds until it is called anew.

        The scratch page and the scratch slot of the states are written to, and nothing else.
        """


@dataclass(frozen=True)
class Draws:
    """How tokens are chosen from rows of logits: what the op `choose_tokens` is given beside logits and positions.

    Attributes:
        shares: float32 `[3, R]`, temperature, top_p and min_p of each row.
        numbers: int64 `[2, R]`, top_k and key of each row.
        has_filters: whether any row has top_k, top_p or min_p.
    """

    shares: Tensor
    numbers: Tensor
    has_filters: bool


RunAndChoose = Callable[..., tuple[Tensor, Chosen | None]]
"""As `Program.run_and_choose`, of draws and a graph's inputs in order."""


@dataclass(frozen=True)
class NamedGraph:
    """One executable graph. `inputs` are keyword names, batch inputs first, then states; `plans` go before a step.
    `run_and_choose` is there where steps can choose tokens.
    """

    name: str
    function: GraphFunction
    batch_inputs: tuple[str, ...]
    state_names: tuple[str, ...]
    preparation: Preparation | None = None
    plans: tuple[StepPlan, ...] = ()
    run_and_choose: RunAndChoose | None = None


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
        choose_tokens, accept_drafts: the kernels of those ops for the device, if there are any.
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
    choose_tokens: ChooseTokens | None = None
    accept_drafts: AcceptDrafts | None = None
    report: BuildReport = field(default_factory=BuildReport)

    def batch_inputs(self, graph: str = "text") -> tuple[str, ...]:
        """Names of the batch inputs this graph reads (see `ops/batch_inputs.py`)."""
        return self.graphs[graph].batch_inputs

    def reserved_bytes(self, limits: BatchLimits, graph: str = "text") -> int:
        """Memory of the device, in bytes, that `prepare` will take; 0 where a backend prepares nothing."""
        preparation = self.graphs[graph].preparation
        return 0 if preparation is None else preparation.reserved_bytes(limits)

    def prepare(
        self,
        states: Mapping[str, Tensor],
        limits: BatchLimits,
        graph: str = "text",
        progress: Progress | None = None,
    ) -> None:
        """Make a graph ready for steps over these states; no-op where a backend prepares nothing.

        A graph that was not prepared, or for other states, runs all the same, and slower. What was prepared before is
        dropped. Scratch pages and slots are written to.

        Args:
            states: every state tensor by spec name; they stay where they are from now on.
            limits: the largest steps that will come; larger ones run all the same.
            progress: called with one line when something takes a while.
        """
        preparation = self.graphs[graph].preparation
        if preparation is not None:
            preparation.prepare(states, limits, progress or (lambda _: None))

    @torch.inference_mode()
    def run(
        self,
        batch: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        graph: str = "text",
        on_host: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run one step of a named graph; states are updated in place.

        Args:
            batch: every name in `batch_inputs(graph)`; other names are ignored.
            states: every state tensor by spec name.
            on_host: those batch inputs that are known on the host; planning a step waits for the device without.
        Returns:
            Logits `[R, vocab_size]` in the program's dtype, one row per entry of `logits_indices`.
        """
        return self.graphs[graph].function(*self._inputs(graph, batch, states, on_host))

    @property
    def chooses_tokens(self) -> bool:
        """Whether `run_and_choose` may choose."""
        return self.graphs["text"].run_and_choose is not None

    @torch.inference_mode()
    def run_and_choose(
        self,
        batch: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        draws: Draws | None,
        on_host: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Chosen | None]:
        """Run one step of `text`, in which tokens are chosen from the first rows of logits where a graph has that.

        Args:
            draws: of those rows; the position of each token is the one behind its row's. The same object stands for
                the same values. None chooses nothing.
        Returns:
            Logits as `run` gives them, which hold until the next step; and what was chosen, None where nothing was.
        """
        run_and_choose = self.graphs["text"].run_and_choose
        if run_and_choose is None:
            return self.run(batch, states, on_host=on_host), None
        return run_and_choose(draws, *self._inputs("text", batch, states, on_host))

    def _inputs(
        self,
        graph: str,
        batch: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        on_host: Mapping[str, Tensor] | None,
    ) -> list[Tensor]:
        """Inputs of a graph in order, its step planned."""
        named = self.graphs[graph]
        for plan in named.plans:
            plan.prepare({**batch, **(on_host or {})}, states)
        return [*(batch[name] for name in named.batch_inputs), *(states[name] for name in named.state_names)]
