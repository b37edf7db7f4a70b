"""Start-up: what makes importing and building large things faster, as long as that takes."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection while open: imports and builds make objects that stay, by the hundred thousand.

    Looking through them again and again costs a fifth of the time that importing transformers takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
