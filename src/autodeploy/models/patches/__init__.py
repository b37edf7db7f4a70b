"""Patches to a model's own functions: the last resort, for upstream code that no hook, op or transform can reach.

`PATCHES` is the list; `patched()` is open while a model is traced. The rules for adding one:

- One file per obstacle, named after what is in the way and not after a model. A hook on a Hugging Face interface comes
  first, then a graph transform, then a patch.
- Its docstring says why (what fails, with the error), for which versions of transformers or torch, the upstream issue,
  and when the file can go.
- It is reversible: a context manager around capture that leaves the model's code as it found it.
- It keeps the numbers: its test compares the patched function with the original.
- The repository's tests count the files here; the count is meant to fall.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from autodeploy.models.patches import experts_in_attention

PATCHES: tuple[Callable[[], AbstractContextManager[None]], ...] = (experts_in_attention.patch,)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """While open, every patch whose module is loaded is in place."""
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            stack.enter_context(patch())
        yield
