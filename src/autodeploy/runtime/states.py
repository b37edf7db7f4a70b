"""State memory: state specs and a memory budget go in, a plan (pages per group, slots) and zeroed tensors come out."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodeploy.compile.program import BatchLimits, Program
from autodeploy.config import EngineOptions
from autodeploy.errors import OutOfMemoryError
from autodeploy.memory import available_bytes, zeros_when_touched
from autodeploy.ops.state import PagedState, SlotState, StateSpec
from autodeploy.runtime.pages import PageGroup, StateAllocator

logger = logging.getLogger(__name__)

UNLIMITED_MODEL_LEN = 8192
"""Context limit when neither the user nor the model sets one."""
MIN_MODEL_LEN = 2048
"""When the user sets no limit, the model's own may shrink to what fits in memory, but not below this."""


@dataclass(frozen=True, kw_only=True)
class StatePlan:
    """How many pages and slots there are, and the longest sequence they serve.

    Attributes:
        groups: geometry of each group of paged states; page counts include scratch page 0.
        num_slots: slots, scratch slot 0 included; one less is how many sequences run at once.
        num_snapshots: rows behind the slots that keep slot states for the prefix cache.
        num_backups: rows behind those, one per slot or none, that keep slot states while drafts are verified.
        page_size: tokens per page.
        max_model_len: longest sequence in tokens, prompt and output together.
        num_bytes: memory of all state tensors.
    """

    groups: tuple[PageGroup, ...]
    num_slots: int
    num_snapshots: int
    num_backups: int
    page_size: int
    max_model_len: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of every slot state."""
        return self.num_slots + self.num_snapshots + self.num_backups

    def allocator(self) -> StateAllocator:
        """Who hands out the pages and slots of this plan."""
        return StateAllocator(
            self.groups, num_slots=self.num_slots, page_size=self.page_size, max_model_len=self.max_model_len
        )

    def backup_row(self, slot: int) -> int:
        return self.num_slots + self.num_snapshots + slot


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one page of each group and of one row of slots, all specs of the group together."""

    page_bytes: dict[PageGroup, int]
    slot_bytes: int

    @staticmethod
    def of(specs: Iterable[StateSpec], page_size: int) -> "StateBytes":
        pages: dict[PageGroup, int] = {}
        slot_bytes = 0
        for spec in specs:
            if isinstance(spec, PagedState):
                group = PageGroup(name=spec.group, num_pages=0, window=spec.window)
                pages[group] = pages.get(group, 0) + spec.bytes_per_token * page_size
            else:
                slot_bytes += spec.bytes_per_slot
        return StateBytes(page_bytes=pages, slot_bytes=slot_bytes)


def memory_budget(options: EngineOptions, device: torch.device, reserved_bytes: int = 0) -> int:
    """Bytes that all states together may take, of what is free beside `reserved_bytes`."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    return int(max(0, available_bytes(device) - reserved_bytes) * options.memory_fraction)


def reserved_bytes(program: Program, options: EngineOptions, max_model_len: int | None, graph: str = "text") -> int:
    """Memory that a graph's preparation will take beside states, in bytes; 0 where the user said how much states take.

    Args:
        max_model_len: the longest sequence that there may be, as far as that is known before states are planned.
    """
    if options.kv_cache_memory_bytes is not None:
        return 0
    length = max_model_len or program.max_model_len or UNLIMITED_MODEL_LEN
    return program.reserved_bytes(batch_limits(options, options.max_num_seqs, length), graph)


def batch_limits(options: EngineOptions, max_num_seqs: int, max_model_len: int) -> BatchLimits:
    """The largest steps of an engine with these options."""
    return BatchLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens, max_num_seqs),
        max_model_len=max_model_len,
        page_size=options.page_size,
    )


def bytes_per_sequence(specs: Iterable[StateSpec], options: EngineOptions, num_tokens: int = MIN_MODEL_LEN) -> int:
    """Bytes that the states of one sequence take, to compare programs by."""
    return _minimum_bytes(StateBytes.of(specs, options.page_size), options, num_tokens)


def plan_states(
    specs: Sequence[StateSpec],
    options: EngineOptions,
    *,
    device: torch.device,
    max_model_len: int | None,
    model_limit: int | None,
    reserved_bytes: int = 0,
) -> StatePlan:
    """Decide page and slot counts within the memory budget.

    Args:
        max_model_len: the user's context limit. It fits or is refused; it never shrinks.
        model_limit: the model's own limit, used when the user sets none; it shrinks to what fits.
        reserved_bytes: memory of the device that is free and is wanted for something else.
    Raises:
        OutOfMemoryError: one sequence does not fit; says the bytes needed and available, and which option to change.
    """
    budget = memory_budget(options, device, reserved_bytes)
    sizes = StateBytes.of(specs, options.page_size)
    wanted = max_model_len or model_limit or UNLIMITED_MODEL_LEN
    length = min(wanted, _longest_fitting(sizes, options, wanted, budget))
    smallest = wanted if max_model_len is not None else min(wanted, MIN_MODEL_LEN)
    if length < smallest:
        raise OutOfMemoryError(_refusal(sizes, options, smallest, budget, is_user_limit=max_model_len is not None))
    if length < wanted:
        hint = "raise kv_cache_memory_bytes or memory_fraction for more"
        logger.warning("max_model_len is %d tokens, what the state memory holds, not %d; %s", length, wanted, hint)
    return _divide(sizes, options, length, budget)


def _further_window_pages(group: PageGroup, options: EngineOptions, window_pages: int) -> int:
    """Pages that a window group can use beyond the `window_pages` of all sequences' windows: those that the tokens of
    one step take before the windows have moved on, and the windows of as many known prefixes as there are sequences.
    """
    if group.window is None:
        return 0
    chunk_pages = -(-options.max_num_batched_tokens // options.page_size)
    return chunk_pages + (window_pages if options.enable_prefix_caching else 0)


def _minimum_bytes(sizes: StateBytes, options: EngineOptions, length: int) -> int:
    """Bytes for one sequence of this length, with scratch pages and slot."""
    pages = sum(
        (1 + group.max_pages(length, options.page_size)) * page_bytes for group, page_bytes in sizes.page_bytes.items()
    )
    return pages + 2 * _rows_per_slot(options) * sizes.slot_bytes


def _rows_per_slot(options: EngineOptions) -> int:
    """The slot itself and, while drafts are verified, what it held before them."""
    return 1 if options.speculative_config is None else 2


def _longest_fitting(sizes: StateBytes, options: EngineOptions, wanted: int, budget: int) -> int:
    """Longest sequence, at most `wanted` tokens, that fits the budget when nothing else runs."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        if _minimum_bytes(sizes, options, middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _divide(sizes: StateBytes, options: EngineOptions, length: int, budget: int) -> StatePlan:
    """Share the budget: one longest sequence first, then slots, at most half of what is left, then snapshots, at most a
    quarter of what is left then and as many as there may be sequences, then pages.

    All groups get the same number of further pages, up to what `max_num_seqs` longest sequences could use: while
    sequences are shorter than a window, each needs as many pages of a window group as of any other.
    """
    spare = budget - _minimum_bytes(sizes, options, length)
    num_seqs = options.max_num_seqs
    bytes_per_seq = _rows_per_slot(options) * sizes.slot_bytes
    if bytes_per_seq:
        num_seqs = min(num_seqs, 1 + (spare // 2 if sizes.page_bytes else spare) // bytes_per_seq)
    spare -= (num_seqs - 1) * bytes_per_seq
    num_snapshots = 0
    if sizes.slot_bytes and options.enable_prefix_caching:
        num_snapshots = min(options.max_num_seqs, (spare // 4 if sizes.page_bytes else spare) // sizes.slot_bytes)
    spare -= num_snapshots * sizes.slot_bytes
    one = {group: group.max_pages(length, options.page_size) for group in sizes.page_bytes}
    most = {
        group: (num_seqs - 1) * one[group] + _further_window_pages(group, options, num_seqs * one[group])
        for group in sizes.page_bytes
    }
    low, high = 0, max(most.values(), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(size * min(most[group], middle) for group, size in sizes.page_bytes.items()) <= spare:
            low = middle
        else:
            high = middle - 1
    pages = {group: 1 + one[group] + min(most[group], low) for group in sizes.page_bytes}
    groups = tuple(
        PageGroup(name=group.name, num_pages=pages[group], window=group.window) for group in sizes.page_bytes
    )
    num_bytes = (num_seqs + 1) * bytes_per_seq + num_snapshots * sizes.slot_bytes
    num_bytes += sum(pages[group] * size for group, size in sizes.page_bytes.items())
    return StatePlan(
        groups=groups,
        num_slots=num_seqs + 1,
        num_snapshots=num_snapshots,
        num_backups=num_seqs + 1 if sizes.slot_bytes and _rows_per_slot(options) == 2 else 0,
        page_size=options.page_size,
        max_model_len=length,
        num_bytes=num_bytes,
    )


def _refusal(sizes: StateBytes, options: EngineOptions, length: int, budget: int, *, is_user_limit: bool) -> str:
    needed = _minimum_bytes(sizes, options, length)
    source = (
        "kv_cache_memory_bytes"
        if options.kv_cache_memory_bytes is not None
        else f"memory_fraction={options.memory_fraction:g} of the free memory"
    )
    shorter = "lower max_model_len or " if is_user_limit else ""
    return (
        f"the states of one sequence of {length} tokens need {needed} bytes, but {source} gives {budget} bytes; "
        f"{shorter}raise {'kv_cache_memory_bytes' if options.kv_cache_memory_bytes is not None else 'memory_fraction'}"
    )


def allocate_states(specs: Iterable[StateSpec], plan: StatePlan, device: torch.device) -> dict[str, Tensor]:
    """Zeroed tensors by spec name.

    `[num_pages, page_size, *shape]` for paged states, `[num_rows, *shape]` for slot states.

    Raises:
        OutOfMemoryError: the device refuses the memory after all.
    """
    num_pages = {group.name: group.num_pages for group in plan.groups}
    tensors: dict[str, Tensor] = {}
    try:
        for spec in specs:
            if isinstance(spec, PagedState):
                leading: tuple[int, ...] = (num_pages[spec.group], plan.page_size)
            else:
                leading = (plan.num_rows,)
            tensors[spec.name] = _zeros((*leading, *spec.shape), spec.dtype, device)
    except (RuntimeError, MemoryError, ValueError) as error:  # from CUDA, NumPy, and NumPy beyond the address space
        raise OutOfMemoryError(
            f"{device} did not give {plan.num_bytes} bytes for states; lower memory_fraction or kv_cache_memory_bytes"
        ) from error
    return tensors


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU from memory that the system hands out zeroed when it is first touched, so that unused pages of
    a large budget cost neither time nor memory.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeros_when_touched(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def copy_slot(specs: Iterable[StateSpec], states: dict[str, Tensor], source: int, target: int) -> None:
    """Copy the slot states of one row to another; from row 0, which is scratch, come zeros: a sequence starts."""
    for spec in specs:
        if isinstance(spec, SlotState):
            if source:
                states[spec.name][target].copy_(states[spec.name][source])
            else:
                states[spec.name][target].zero_()
