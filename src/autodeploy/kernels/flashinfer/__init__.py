"""The FlashInfer provider: attention over pages, planned once for each step, and norms, by package flashinfer-python.

attention.py   cached_attention, and the plan that all layers alike share
norm.py        rms_norm, add_rms_norm

Its kernels are compiled when they are first called, so it is imported where `attn_backend` names it and nowhere else.
What it has and we do not take is in `NOT_TAKEN`, with the reason.
"""

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version

PROVIDER = "flashinfer"

NOT_TAKEN = {
    "choose_tokens": "FlashInfer draws by rejection with Philox numbers of its own, so a seed would give other tokens "
    "than it gives with every other kernel"
}
"""By op, why there is no kernel of FlashInfer's for it."""

_OLDEST = (0, 7)
_MODULES = ("attention", "norm")


def why_unavailable() -> str | None:
    """The reason that FlashInfer cannot be used here, or None."""
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        return "the package flashinfer-python is not installed; install autodeploy[flashinfer]"
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"flashinfer-python {found} is installed; {'.'.join(map(str, _OLDEST))} or newer is needed"
    return None


@functools.cache
def load() -> None:
    """Register the kernels."""
    for name in _MODULES:
        importlib.import_module(f"{__name__}.{name}")


__all__ = ["NOT_TAKEN", "PROVIDER", "load", "why_unavailable"]
