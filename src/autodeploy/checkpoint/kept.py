"""Kept weights: what a start has quantised goes into the cache directory, and comes out at the next one.

Rounding takes longer than all else that a second start does; what it gives is a fraction of what it reads. An entry is
one file of tensors, one after another, and a list of what they are. Its key holds that of the lowered graph, which
says how weights are made, and for each weight file which one it is and when it last changed.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodeploy.cache_dir import discard, entry, fill
from autodeploy.checkpoint.recipe import Quantize
from autodeploy.errors import ConfigError

logger = logging.getLogger(__name__)

SETTLED_SECONDS = 2.0
"""A file that changed later than this before it is looked at may change again without its times telling."""
LEAST_FREE_SHARE = 2
"""Weights are kept where the disk has room for them so many times."""
_KIND, _TENSORS, _CONTENTS, _OWNER = "weights", "tensors.bin", "contents.json", "owner.json"
_CONTENT = "the quantised weights"


class KeptWeights:
    """The entry of one model's quantised weights, whether it exists or not.

    Args:
        graph: the key of the lowered graph that they are for.
        owner: whose weights they are, as JSON values. An owner has one entry: keeping another one removes it.
        files: the checkpoint's weight files; weights of a model without any are not kept.

    Attributes:
        path: the entry's folder.
        is_used: whether weights were found in it.
    """

    def __init__(self, graph: str, owner: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._owner, self._files = dict(owner), files
        self._states = self._look()
        newest = max((max(state[-2:]) for state in self._states), default=None)
        self._is_settled = newest is not None and time.time() - newest / 1e9 > SETTLED_SECONDS
        self.is_used = False
        self.path = entry(_KIND, {"graph": graph, "owner": self._owner, "files": self._states})

    @contextmanager
    def opened(self, recipes: Collection[Quantize]) -> Iterator["OpenWeights | None"]:
        """What is kept of exactly these weights, for reading; None when nothing is."""
        found = self._open(recipes) if self._is_settled else None
        self.is_used = found is not None
        try:
            yield found
        finally:
            if found is not None:
                os.close(found.descriptor)

    def _open(self, recipes: Collection[Quantize]) -> "OpenWeights | None":
        try:
            contents = json.loads((self.path / _CONTENTS).read_text(encoding="utf-8"))
            descriptor = os.open(self.path / _TENSORS, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            discard(self.path, _CONTENT, error)
            return None
        starts, end = _starts(recipes)
        num_bytes = os.fstat(descriptor).st_size
        if contents == _described(starts) and num_bytes == end:
            return OpenWeights(descriptor, starts)
        os.close(descriptor)
        reason = f"{num_bytes} bytes where {end} are expected" if num_bytes != end else "they are other weights"
        discard(self.path, _CONTENT, reason)
        return None

    def save(self, weights: Mapping[Quantize, Tensor]) -> None:
        """Keep these weights; nothing if their files changed meanwhile, or where the disk has little room."""
        if not (self._is_settled and weights) or self.path.is_dir() or self._look() != self._states:
            return
        starts, num_bytes = _starts(weights)

        def write(folder: Path) -> None:
            free = shutil.disk_usage(folder).free
            if free < LEAST_FREE_SHARE * num_bytes:
                raise ConfigError(f"they take {num_bytes} bytes, and the disk of {folder.parent} has {free} left")
            (folder / _OWNER).write_text(json.dumps(self._owner), encoding="utf-8")
            (folder / _CONTENTS).write_text(json.dumps(_described(starts)), encoding="utf-8")
            with (folder / _TENSORS).open("wb") as file:
                for recipe in starts:
                    file.write(_bytes_of(weights[recipe].cpu()))
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive what it names when the machine stops

        try:
            fill(self.path, write)
        except ConfigError as error:
            logger.warning("the quantised weights are not kept for the next start: %s", error)
        else:
            self._remove_others()

    def _remove_others(self) -> None:
        """The owner's earlier entries; a process that reads one has it open."""
        for owner in self.path.parent.glob(f"[!.]*/{_OWNER}"):
            try:
                is_older = owner.parent != self.path and json.loads(owner.read_text(encoding="utf-8")) == self._owner
            except (OSError, ValueError):
                continue
            if is_older:
                shutil.rmtree(owner.parent, ignore_errors=True)

    def _look(self) -> list[list[int]]:
        """Of each file device, number, bytes, and when its content and anything about it last changed, in ns.

        Nothing where one cannot be looked at, which is no content that anything is kept for.
        """
        try:
            found = [path.stat() for path in self._files]
        except OSError:
            return []
        return [[of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns] for of in found]


@dataclass(frozen=True)
class OpenWeights:
    """Kept weights, open for reading by several threads.

    Attributes:
        descriptor: of their file.
        starts: where each begins in it.
    """

    descriptor: int
    starts: Mapping[Quantize, int]

    def read(self, recipe: Quantize, out: Tensor) -> None:
        """Write the recipe's tensor to `out`, on any device, of any strides. Raises OSError when it cannot be read."""
        is_direct = out.device.type == "cpu" and out.is_contiguous()
        read = out if is_direct else torch.empty(out.shape, dtype=out.dtype)
        place, position = _bytes_of(read), self.starts[recipe]
        while place:
            count = os.preadv(self.descriptor, [place], position)
            if count == 0:
                raise OSError(f"kept weights end at byte {position}")
            place, position = place[count:], position + count
        if not is_direct:
            out.copy_(read)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _described(recipes: Iterable[Quantize]) -> list[list[Any]]:
    return [[str(recipe), str(recipe.dtype), list(recipe.shape)] for recipe in recipes]


def _starts(recipes: Iterable[Quantize]) -> tuple[dict[Quantize, int], int]:
    """Where each tensor begins in the file, in the file's order, and where the last one ends."""
    starts, end = {}, 0
    for recipe in sorted(recipes, key=str):  # the order that they come in is another in every process
        starts[recipe] = end
        end += math.prod(recipe.shape) * recipe.dtype.itemsize
    return starts, end
