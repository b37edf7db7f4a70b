"""A step on the device: a batch goes in, tokens that are chosen and may not be there yet come out."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from autodeploy.compile.program import Program
from autodeploy.runtime.batch import Batch
from autodeploy.runtime.sampler import Choice, Sampler
from autodeploy.runtime.verify import choose_at_once


@dataclass(frozen=True)
class Flight:
    """A step that the device is at work on, or has done.

    Attributes:
        choice: tokens for the sequences in `batch.sampled`, and of rows behind their drafts, on their way to the host;
            None where one token has to be known before the next is chosen.
        latest_R: the same tokens [R], on the device.
        logits_RV: those of the batch, where more than `choice` has to be read of them; before the next step.
    """

    batch: Batch
    choice: Choice | None = None
    latest_R: Tensor | None = None
    logits_RV: Tensor | None = None


def launch(
    program: Program, states: Mapping[str, Tensor], sampler: Sampler, batch: Batch, latest_R: Tensor | None
) -> Flight:
    """Run a batch and choose tokens, as far as that goes without waiting for the device.

    Args:
        latest_R: the tokens that `Sequence.pending_row` means, on the device.
    """
    if batch.has_drafts:
        logits_RV = program.run(batch.inputs, states, on_host=batch.on_host)
        choice = choose_at_once(sampler, logits_RV[: batch.num_sampled_rows], batch.sampled)
    else:
        draws = sampler.draws(batch.sampled, batch.inputs["input_ids"]) if program.chooses_tokens else None
        logits_RV, chosen = program.run_and_choose(batch.inputs, states, draws, batch.on_host)
        choice = sampler.choose(logits_RV[: batch.num_sampled_rows], batch.sampled, latest_R, chosen=chosen)
    if choice is None:
        return Flight(batch, logits_RV=logits_RV)
    return Flight(batch, choice.on_host(), choice.tokens_R, logits_RV if batch.prompt_rows else None)
