"""The cache directory: what a build leaves behind goes in under the content of its key, and comes out by the same key.

The root is `$AUTODEPLOY_CACHE`, by default `~/.cache/autodeploy`. An entry is a folder that appears whole or not at
all, so that processes starting at the same moment do not wait for each other's work. Entries are trusted on reading:
keep the root private.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from autodeploy import env
from autodeploy.errors import ConfigError

logger = logging.getLogger(__name__)

LEAST_FREE_BYTES = 2**16


def entry(kind: str, key: Mapping[str, Any]) -> Path:
    """Path of the entry for `key`, whether it exists or not: `<root>/<kind>/<hash of the key>`.

    Args:
        kind: a folder name such as "gguf"; one per sort of artefact.
        key: everything the content depends on, as JSON values. The order of its items does not matter.

    Raises:
        TypeError: a key value that JSON cannot express.
    """
    content = json.dumps(key, sort_keys=True, allow_nan=False)
    return env.cache_root() / kind / hashlib.sha256(content.encode()).hexdigest()[:32]


def fill(path: Path, write: Callable[[Path], None]) -> Path:
    """Make the entry at `path` by `write(folder)`, unless it is there already; returns `path`.

    `write` gets an empty folder beside the entry, which is renamed when `write` returns and removed when it raises. Of
    two processes filling one entry at once, the first to finish wins and the other's work is thrown away. What a
    process left that was killed meanwhile is removed by the next one that fills an entry of the same kind.

    Raises:
        ConfigError: the cache directory cannot be written, or is full.
    """
    if path.is_dir():
        return path
    with _new_folder(path) as folder:
        try:
            write(folder)
        except Exception as error:
            if _is_full(folder, error):
                raise ConfigError(
                    f"the disk of the cache directory {path.parent} is full ({error}); make room, or set "
                    "AUTODEPLOY_CACHE to a folder that has it"
                ) from error
            raise
        try:
            folder.rename(path)
        except OSError:
            if not path.is_dir():  # anything but another process having finished first
                raise
    return path


def discard(path: Path, content: str, reason: object) -> None:
    """Remove an entry that cannot be read, with a warning that says why; it is made anew when it is missed.

    Args:
        content: what it keeps, as in "the graph".
    """
    logger.warning("%s kept in %s cannot be read (%s), and is made anew", content, path, reason)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside an entry, locked while it is filled; removed at the end, if it is still there."""
    with ExitStack() as held:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(path.parent, waits=True):  # between making a folder and locking it, nobody looks
                _remove_abandoned(path.parent)
                folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
                held.enter_context(_locked(folder))
        except OSError as error:
            raise ConfigError(
                f"the cache directory {path.parent} cannot be written ({error}); set AUTODEPLOY_CACHE to a folder that "
                "can"
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove folders that were being filled by processes that are no more: nobody holds their lock."""
    for folder in parent.glob(".*-*"):
        with suppress(FileNotFoundError), _locked(folder) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, waits: bool = False) -> Iterator[bool]:
    """Hold a folder's lock, which ends with its process. Yields False where another has it, or there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def _is_full(folder: Path, error: Exception) -> bool:
    """By what the error says, or, where a tool died of it without a word, by what is left."""
    is_said = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return is_said or shutil.disk_usage(folder).free < LEAST_FREE_BYTES
