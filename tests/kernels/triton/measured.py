"""Measuring without a device: launches on the CPU choose their configuration as those on a device do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy.kernels.triton import launch


@dataclass
class Bench:
    """Stands in for `do_bench`: each configuration that is measured runs twice.

    Attributes:
        milliseconds: found for the configurations of a kernel, in order; counted up by default.
        ran: the configurations that kernels ran in.
        num_measured: how many of them were measured.
    """

    milliseconds: list[float] | None = None
    ran: list[Any] = field(default_factory=list)
    num_measured: int = 0

    def __call__(self, run: Callable[[], None], **_: Any) -> float:
        run()
        run()
        self.num_measured += 1
        if self.milliseconds is None:
            return float(self.num_measured)
        return self.milliseconds[(self.num_measured - 1) % max(1, len(self.milliseconds))]


def tuned_on_the_cpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Bench:
    """From here on, launches in Triton's interpreter are measured where a device would measure them."""
    bench, run = Bench(), launch.Launcher._run

    def noted(self: Any, configuration: Any, grid: Any, arguments: tuple[Any, ...], values: Mapping[str, Any]) -> None:
        bench.ran.append(configuration)
        run(self, configuration, grid, arguments, values)

    def call(self: Any, grid: Any, *arguments: Any, **values: Any) -> None:
        configuration = self._configuration(torch.device("cpu"), grid, arguments, values)
        self._run(configuration, grid, arguments, values)

    monkeypatch.setenv("AUTODEPLOY_CACHE", str(cache))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")
    monkeypatch.setattr(launch, "do_bench", bench)
    monkeypatch.setattr(launch.Launcher, "_run", noted)
    monkeypatch.setattr(launch.Launcher, "__call__", call)
    text = property(lambda function: f"{function.fn.__module__}.{function.fn.__name__}")
    monkeypatch.setattr(triton_function(), "cache_key", text, raising=False)
    return bench


def triton_function() -> type:
    """What a jitted function is in the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction
