"""A program small enough to be checked by eye: its next token is a hash of the whole context read from its states.

A layer turns the value x_p of each token into y_p, by what it can see of the sequence:

    full      hash of x_0 .. x_p, read back through pages
    window    hash of the last WINDOW values up to x_p, read back through pages
    slot      running hash, kept in a slot

The last y gives the logits. A program may have a draft head: it takes the next y for the hash of a token and the y of
the token before, which is right where the only layer is full or slot.

One value lost, misplaced, or taken from a neighbour changes the tokens that follow. With two layers, the reads of every
token of a chunk matter, not only those of the last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autodeploy.compile.program import DraftHead, NamedGraph, Program
from autodeploy.ops.state import PagedState, SlotState, StateSpec

MODULUS = 2**31 - 1
BASE = 1_000_003
WINDOW = 5
VOCAB = 23
EOS = 7


def hash_values(values: Sequence[int], start: int = 1) -> int:
    for value in values:
        start = (start * BASE + value + 1) % MODULUS
    return start


def logits_of(value: int) -> list[float]:
    return [((value * (token + 11) ** 3) % MODULUS) / MODULUS for token in range(VOCAB)]


def reference_logits(layers: Sequence[str], token_ids: Sequence[int]) -> list[float]:
    """Logits after the last token, in plain Python and without any state."""
    values = list(token_ids)
    for layer in layers:
        reach = WINDOW if layer == "window" else len(values)
        values = [hash_values(values[max(0, at + 1 - reach) : at + 1]) for at in range(len(values))]
    return logits_of(values[-1])


def reference_tokens(
    layers: Sequence[str], prompt: Sequence[int], num_tokens: int, stop: Sequence[int] = ()
) -> list[int]:
    """Greedy tokens after a prompt, at most `num_tokens`, up to and including the first of `stop`."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens:
        logits = reference_logits(layers, token_ids)
        token_ids.append(max(range(VOCAB), key=logits.__getitem__))
        if token_ids[-1] in stop:
            break
    return token_ids[len(prompt) :]


def toy_program(
    layers: Sequence[str],
    *,
    max_model_len: int | None = 64,
    eos_token_ids: tuple[int, ...] = (),
    poison: int | None = None,
    err_every: int | None = None,
    head_errs_every: int | None = None,
) -> Program:
    """A program of these layers. A context that ends in the token `poison` gets NaN logits.

    One context in `err_every`, by its hash, gets the logits of another context: such a program is a fair draft model.
    With `head_errs_every` the program has a head, which errs in the same way; 0: never.
    """
    specs: list[StateSpec] = []
    names = ["input_ids", "position_ids", "cu_seqlens", "seq_lens", "logits_indices", "state_slots"]
    for at, layer in enumerate(layers):
        if layer == "slot":
            specs.append(SlotState(name=f"layers.{at}", shape=(1,), dtype=torch.int64))
        else:
            window = WINDOW if layer == "window" else None
            specs.append(PagedState(name=f"layers.{at}", shape=(1,), dtype=torch.int64, window=window))
            group = specs[-1].group
            names += [name for name in (f"page_table_{group}", f"slot_mapping_{group}") if name not in names]
    kept = PagedState(name="hidden", shape=(1,), dtype=torch.int64)
    if head_errs_every is not None:
        specs.append(kept)
        names += [name for name in ("page_table_full", "slot_mapping_full") if name not in names]

    def run(*inputs: Tensor) -> Tensor:
        batch = dict(zip(names, inputs, strict=False))
        states = dict(zip([spec.name for spec in specs], inputs[len(names) :], strict=True))
        assert batch["input_ids"].dtype == torch.int64 and batch["cu_seqlens"].dtype == torch.int32
        input_ids = batch["input_ids"][0].tolist()
        values = list(input_ids)
        for spec in specs:
            if spec is kept:
                _keep(states[spec.name], values, batch)
            else:
                values = _run_layer(spec, states[spec.name], values, batch)
        rows = batch["logits_indices"].tolist()
        seen = [values[row] for row in rows]
        if err_every is not None:
            seen = [hash_values([0], start=value) if value % err_every == 0 else value for value in seen]
        logits = torch.tensor([logits_of(value) for value in seen])
        for at, row in enumerate(rows):
            if input_ids[row] == poison:
                logits[at] = torch.nan
        return logits

    graphs = {"text": NamedGraph("text", run, tuple(names), tuple(spec.name for spec in specs))}
    head = None
    if head_errs_every is not None:
        graphs["head"] = _toy_head(head_errs_every)
        head = DraftHead(states=[kept], hidden_state="hidden", own_hidden_state="hidden")
    return Program(
        graphs=graphs,
        head=head,
        states=specs,
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=eos_token_ids,
    )


def _toy_head(err_every: int) -> NamedGraph:
    def run(
        input_ids: Tensor, hidden: Tensor, logits_indices: Tensor, page_table: Tensor, slot_mapping: Tensor, own: Tensor
    ) -> Tensor:
        pairs = zip(input_ids[0].tolist(), hidden[0, :, 0].tolist(), strict=True)
        values = [hash_values([token], start=before) for token, before in pairs]
        _keep(own, values, {"slot_mapping_full": slot_mapping})
        seen = [values[row] for row in logits_indices.tolist()]
        if err_every:
            seen = [hash_values([0], start=value) if value % err_every == 0 else value for value in seen]
        return torch.tensor([logits_of(value) for value in seen])

    names = ("input_ids", "hidden_states", "logits_indices", "page_table_full", "slot_mapping_full")
    return NamedGraph("head", run, names, ("hidden",))


def _keep(state: Tensor, values: list[int], batch: dict[str, Tensor]) -> None:
    state.view(-1)[batch["slot_mapping_full"]] = torch.tensor(values)


def _run_layer(spec: StateSpec, state: Tensor, values: list[int], batch: dict[str, Tensor]) -> list[int]:
    starts, lengths = batch["cu_seqlens"].tolist(), batch["seq_lens"].tolist()
    positions = batch["position_ids"][0].tolist()
    result = []
    if isinstance(spec, SlotState):
        for at, slot in enumerate(batch["state_slots"].tolist()):
            running = int(state[slot, 0])
            for value in values[starts[at] : starts[at + 1]]:
                # Zero is a fresh state; it stands for the first value of the hash.
                running = hash_values([value], start=running or 1)
                result.append(running)
            state[slot, 0] = running
        return result
    page_size = state.shape[1]
    flat = state.view(-1)
    for value, where in zip(values, batch[f"slot_mapping_{spec.group}"].tolist(), strict=True):
        assert where >= page_size, "a token is written to the scratch page"
        flat[where] = value
    for at, row in enumerate(batch[f"page_table_{spec.group}"].tolist()):
        chunk = range(starts[at], starts[at + 1])
        assert [positions[t] for t in chunk] == list(range(lengths[at] - len(chunk), lengths[at]))
        first = 0 if spec.window is None else max(0, positions[chunk[0]] + 1 - spec.window)
        context = [int(flat[row[p // page_size] * page_size + p % page_size]) for p in range(first, lengths[at])]
        for t in chunk:
            end = positions[t] + 1
            begin = 0 if spec.window is None else max(0, end - spec.window)
            result.append(hash_values(context[begin - first : end - first]))
    return result
