"""The cache directory: what a build leaves behind goes in under the content of its key, and comes out by the same key.

The root is `$AUTODEPLOY_CACHE`, by default `~/.cache/autodeploy`. An entry is a folder that appears whole or not at
all, so that processes starting at the same moment need no lock. Entries are trusted on reading: keep the root private.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autodeploy import env
from autodeploy.errors import ConfigError


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
    two processes filling one entry at once, the first to finish wins and the other's work is thrown away.

    Raises:
        ConfigError: the cache directory cannot be written.
    """
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ConfigError(
            f"the cache directory {path.parent} cannot be written ({error}); set AUTODEPLOY_CACHE to a folder that can"
        ) from error
    try:
        write(folder)
        try:
            folder.rename(path)
        except OSError:
            if not path.is_dir():  # anything but another process having finished first
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path
