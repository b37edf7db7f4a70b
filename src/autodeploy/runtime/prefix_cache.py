"""The prefix cache: a sequence goes in, the part of it whose states are already in memory comes out (no torch).

Pages are known by content: the hash of a full page covers its tokens, all tokens before them, and the request's salt.
A waiting sequence shares the longest run of whole pages that every kind of state has:

    all tokens    every page from the first on
    window        the pages that a query behind the prefix can still see
    slot          a snapshot: a copy of the slot, made when exactly these tokens were in it

The last token is always computed: its logits are wanted. Nothing is copied but snapshots.

Snapshots are few (rows behind the slots, the one used longest ago is given up), so they are made where they will be
wanted: at the last page boundary of a prompt, where a prompt parts from one seen before, at the ends of chunks, and one
per sequence that follows its output. A prompt's chunks are cut at such places; `SNAPSHOT_PAGES` apart at least, so that
short prompts are not cut.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from hashlib import sha256

from autodeploy.runtime.pages import Prefix, StateAllocator
from autodeploy.runtime.request import Sequence

SNAPSHOT_PAGES = 4
"""A snapshot follows the one before it, of the same sequence, by at least this many pages."""
MAX_SEEN_PAGES = 2**15
"""Hashes of pages remembered, to see where prompts part; a quarter of a kilobyte each."""


def page_hash(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """What a full page holds: its tokens, and through the parent's hash all tokens before them."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class Snapshots:
    """Which row holds the slot states after which prefix."""

    def __init__(self, rows: range) -> None:
        self._free = list(rows)
        self._row_of: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, content: bytes) -> bool:
        return content in self._row_of

    def row(self, content: bytes) -> int:
        return self._row_of[content]

    def use(self, content: bytes) -> None:
        """Note that a known snapshot is the one used last."""
        self._row_of.move_to_end(content)

    def make(self, content: bytes) -> int:
        """The row for a new snapshot: a free one, or that of the snapshot used longest ago, which is forgotten."""
        row = self._free.pop() if self._free else self._row_of.popitem(last=False)[1]
        self._row_of[content] = row
        return row

    def discard(self, content: bytes) -> None:
        """Forget a snapshot; no-op when it is not known."""
        row = self._row_of.pop(content, None)
        if row is not None:
            self._free.append(row)


class PrefixCache:
    """Finds, publishes and counts prefixes. What it knows of pages is in the allocator's pools.

    Args:
        allocator: whose pages are shared.
        snapshot_rows: rows of the slot states for snapshots; None when there are no slot states.
        is_enabled: False finds and publishes nothing. So does a program that keeps no states, or has slot states and no
            room for a snapshot.
    """

    def __init__(self, allocator: StateAllocator, *, snapshot_rows: range | None, is_enabled: bool = True) -> None:
        self.num_queried_tokens = self.num_hit_tokens = 0
        self._tables = allocator.tables
        self._page_size = allocator.page_size
        self._snapshots = None if snapshot_rows is None else Snapshots(snapshot_rows)
        self._is_enabled = is_enabled and bool(self._tables if snapshot_rows is None else snapshot_rows)
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    @property
    def has_snapshots(self) -> bool:
        """Whether chunks are cut where snapshots are worth making."""
        return self._snapshots is not None and self._is_enabled

    def can_share(self, sequence: Sequence) -> bool:
        """Whether a sequence could start behind a prefix if all of its prompt were known."""
        return self._is_enabled and self._most_tokens(sequence) >= self._page_size

    def find(self, sequence: Sequence) -> Prefix:
        """The longest prefix of a waiting sequence that can be shared now. Changes nothing."""
        if not self._is_enabled:
            return Prefix()
        hashes = self._hashes(sequence, self._most_tokens(sequence) // self._page_size)
        best = 0
        runs = [0] * len(self._tables)  # known pages up to this one without a gap
        for count, content in enumerate(hashes, start=1):
            is_whole = self._snapshots is None or content in self._snapshots
            for at, table in enumerate(self._tables):
                runs[at] = runs[at] + 1 if table.pool.find(content) is not None else 0
                is_whole = is_whole and runs[at] >= count - table.num_unreachable(count * self._page_size)
                if table.group.window is None and not runs[at]:
                    return self._prefix(hashes[:best])
            if is_whole:
                best = count
        return self._prefix(hashes[:best])

    def start(self, sequence: Sequence, prefix: Prefix) -> None:
        """Note that a sequence starts behind this prefix."""
        sequence.snapshot_tokens, sequence.shared_tokens = prefix.num_tokens, 0
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = prefix.num_tokens
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_hit_tokens += prefix.num_tokens
        if self._snapshots is None or not self._is_enabled:
            return
        if prefix.num_tokens:
            self._snapshots.use(sequence.page_hashes[prefix.num_tokens // self._page_size - 1])
        for content in sequence.page_hashes:
            if content not in self._seen:
                break
            sequence.shared_tokens += self._page_size

    def limit_chunk(self, sequence: Sequence, num_tokens: int) -> int:
        """At most `num_tokens` tokens, 1 at least: a chunk that ends where a snapshot is worth making."""
        if not self.has_snapshots:
            return num_tokens
        start, total = sequence.num_computed_tokens, sequence.num_tokens
        end = start + num_tokens
        for place in (sequence.shared_tokens, self._floor(total - 1)):
            if start < place <= end and self._is_due(sequence, place):
                return place - start
        if end < total and self._floor(end) > start:
            return self._floor(end) - start
        return num_tokens

    def publish(self, sequence: Sequence, num_tokens_before: int) -> int:
        """Make known what a sequence has computed since it had `num_tokens_before` tokens.

        Returns the row that its slot states are to be copied to before they change again; 0 for none.
        """
        first, end = num_tokens_before // self._page_size, sequence.num_computed_tokens // self._page_size
        if first == end or not self._is_enabled:
            return 0
        contents = self._hashes(sequence, end)[first:]
        for table in self._tables:
            table.publish(sequence.slot, first, contents)
        if self._snapshots is None:
            return 0
        self._remember(contents)
        is_boundary = sequence.num_computed_tokens == end * self._page_size
        if not is_boundary or not self._is_due(sequence, sequence.num_computed_tokens):
            return 0
        return self._snapshot(sequence, self._snapshots)

    @staticmethod
    def _most_tokens(sequence: Sequence) -> int:
        """The longest prefix that need not be computed: all but what logits are wanted of."""
        most = len(sequence.token_ids) - 1
        if sequence.wants_prompt_logprobs:  # what has not been said of the prompt yet is read off its logits
            most = min(most, len(sequence.prompt_logprobs) - 1)
        return most

    def _snapshot(self, sequence: Sequence, snapshots: Snapshots) -> int:
        before, now = sequence.snapshot_tokens, sequence.num_computed_tokens
        sequence.snapshot_tokens = now
        if before > sequence.num_prompt_tokens:  # it followed the output, and this one does so better
            snapshots.discard(sequence.page_hashes[before // self._page_size - 1])
        content = sequence.page_hashes[now // self._page_size - 1]
        if content in snapshots:
            snapshots.use(content)
            return 0
        return snapshots.make(content)

    def _is_due(self, sequence: Sequence, num_tokens: int) -> bool:
        return num_tokens - sequence.snapshot_tokens >= SNAPSHOT_PAGES * self._page_size

    def _floor(self, num_tokens: int) -> int:
        return num_tokens // self._page_size * self._page_size

    def _remember(self, contents: SequenceOf[bytes]) -> None:
        for content in contents:
            self._seen[content] = None
            self._seen.move_to_end(content)
        while len(self._seen) > MAX_SEEN_PAGES:
            self._seen.popitem(last=False)

    def _prefix(self, hashes: SequenceOf[bytes]) -> Prefix:
        """The prefix that ends with the last of these pages, all of which are known."""
        if not hashes:
            return Prefix()
        num_tokens = len(hashes) * self._page_size
        pages = tuple(
            [page for content in hashes[table.num_unreachable(num_tokens) :] if (page := table.pool.find(content))]
            for table in self._tables
        )
        snapshot = 0 if self._snapshots is None else self._snapshots.row(hashes[-1])
        return Prefix(num_tokens=num_tokens, pages=pages, snapshot=snapshot)

    def _hashes(self, sequence: Sequence, num_pages: int) -> SequenceOf[bytes]:
        """The hashes of the first pages of a sequence, which keeps them."""
        known = sequence.page_hashes
        while len(known) < num_pages:
            salt = sequence.request.cache_salt
            root = b"" if salt is None else sha256(salt.encode("utf-8", "surrogatepass")).digest()
            start = len(known) * self._page_size
            known.append(page_hash(known[-1] if known else root, sequence.token_ids[start : start + self._page_size]))
        return known[:num_pages]
