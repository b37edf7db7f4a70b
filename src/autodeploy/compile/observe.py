"""Watching a step as it runs: whatever cannot be repeated without Python, because it looks at values, is noticed.

What a step looks like that may be repeated is the same on every device; `replay.py` writes it down on a CPU, a CUDA
graph captures it on a GPU.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_READS = ("tolist", "numpy", "__array__")
"""Methods of a tensor that look at values behind operators' backs; others call an operator that says so."""
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def depends_on_values(func: Any, given: Sequence[Tensor]) -> bool:
    """Whether an operator, for these tensors among its arguments, gives a number or a shape that depends on values."""
    return _may_depend_on_values(func) and not _is_plain_index(func, given)


@functools.cache
def _may_depend_on_values(func: Any) -> bool:
    """Looked up once per operator: a step calls a thousand."""
    return any(tag in func.tags for tag in _DATA_DEPENDENT)


def _is_plain_index(func: Any, given: Sequence[Tensor]) -> bool:
    """Whether an indexing is by numbers, whose result has the shape of its indices."""
    return func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_") and not any(
        value.dtype in (torch.bool, torch.uint8) for value in given[1:]
    )


@contextlib.contextmanager
def noticing_reads(notice: Callable[[str], None]) -> Iterator[None]:
    """While this lasts, `notice` is told, with the reason why it matters, when this thread reads values in Python.

    The methods themselves are replaced: a torch function mode would see every use of a tensor, a third of the time that
    a step takes to be written down.
    """
    thread, own = threading.get_ident(), {name: vars(Tensor).get(name) for name in _READS}

    def noticed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                notice(f"a kernel reads values in Python ({name})")
            return method(*args, **kwargs)

        return read

    for name in _READS:
        setattr(Tensor, name, noticed(name, getattr(Tensor, name)))
    try:
        yield
    finally:
        for name, method in own.items():
            if method is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, method)


def storages(tensors: Sequence[Tensor]) -> set[int]:
    """What the memory of these tensors is told apart by, as long as it exists."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
