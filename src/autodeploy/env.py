"""Environment variables, all of them; each is read anew at every call, and none is needed in service.

AUTODEPLOY_API_KEY       key that clients of `autodeploy serve` must send
AUTODEPLOY_CACHE         folder for what builds leave behind; default `~/.cache/autodeploy`
AUTODEPLOY_DEBUG         1: tracebacks instead of one-line errors on the command line
AUTODEPLOY_NATIVE        0: the reference functions instead of the native CPU kernels
AUTODEPLOY_NATIVE_FLAGS  compiler flags after our own, e.g. for sanitizers
CXX                      the C++ compiler to try first
TRITON_INTERPRET         1: Triton kernels run on CPU tensors, for tests; read by Triton when kernels are imported

Where traces are asked for, OpenTelemetry's SDK reads its own, OTEL_*; the protocol they name is checked here.
"""

import os
import shlex
from pathlib import Path


def api_key() -> str | None:
    """AUTODEPLOY_API_KEY."""
    return os.environ.get("AUTODEPLOY_API_KEY") or None


def cache_root() -> Path:
    """AUTODEPLOY_CACHE; the folder may not exist yet."""
    chosen = os.environ.get("AUTODEPLOY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "autodeploy"


def is_debugging() -> bool:
    """AUTODEPLOY_DEBUG."""
    return os.environ.get("AUTODEPLOY_DEBUG", "0") not in ("", "0")


def is_native_enabled() -> bool:
    """AUTODEPLOY_NATIVE."""
    return os.environ.get("AUTODEPLOY_NATIVE", "1") != "0"


def is_triton_interpreted() -> bool:
    """TRITON_INTERPRET, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def native_flags() -> list[str]:
    """AUTODEPLOY_NATIVE_FLAGS, split as a shell does."""
    return shlex.split(os.environ.get("AUTODEPLOY_NATIVE_FLAGS", ""))


def otlp_protocol() -> str | None:
    """OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, or what holds for all signals; None where neither is set."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return next((value for name in names if (value := os.environ.get(name))), None)


def preferred_compiler() -> str | None:
    """CXX."""
    return os.environ.get("CXX")
