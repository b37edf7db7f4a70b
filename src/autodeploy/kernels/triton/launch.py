"""Launching: a jitted kernel, a grid and arguments go in; the kernel runs in the best of its declared configurations.

Which is the best is measured once per device, kernel text and key, and kept in the cache directory. While a CUDA graph
is captured nothing can be measured: what was not tuned before then runs in the first configuration.

Where Triton's interpreter stands in for a device (`TRITON_INTERPRET=1`), kernels run on CPU tensors, slowly, in their
first configuration. `written_down` collects launches instead of making them, which needs neither device nor data.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from autodeploy import env
from autodeploy.cache_dir import entry, fill

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations and weights that every kernel takes."""

Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]
"""Programs to run along up to three axes, or a function of the values of the configuration."""

_OPTIONS = {"enable_fp_fusion": True}
"""Multiply-adds rounded once; said here because Triton 3.9 warns where nothing is said."""
_PROCESSORS_WITHOUT_DEVICE = 8
_LARGEST_ROW_KEY = 4096
_TUNING_MILLISECONDS = {"warmup": 5, "rep": 20}


def why_refused(*tensors: Tensor | None) -> str | None:
    """The reason that Triton kernels cannot take these (fake) tensors together, or None."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}; there are kernels for float32, bfloat16, float16"
        if elsewhere := why_elsewhere(tensor):
            return elsewhere
    if len({tensor.dtype for tensor in given}) > 1:
        return f"mixed dtypes {', '.join(str(tensor.dtype) for tensor in given)}"
    return None


def why_elsewhere(tensor: Tensor) -> str | None:
    """The reason that Triton kernels cannot take tensors of a device, or None."""
    is_here = tensor.device.type == "cuda" or (tensor.device.type == "cpu" and env.is_triton_interpreted())
    return None if is_here else f"a tensor on {tensor.device}"


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; some number where there is none."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_DEVICE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_key(count: int) -> int:
    """A number of rows as part of a key: a power of two, the same one for all large numbers."""
    return int(min(_LARGEST_ROW_KEY, triton.next_power_of_2(count)))


def tile_sizes(rows: int, columns: int, inputs: int, num_warps: int, num_stages: int) -> Any:
    """A configuration of a product: the size of a program's tile of results, and how many inputs it takes at once."""
    return triton.Config(
        {"ROWS": rows, "COLUMNS": columns, "INPUTS": inputs}, num_warps=num_warps, num_stages=num_stages
    )


@dataclass(frozen=True)
class Launch:
    """A launch that was written down: what `kernel.function[grid](*arguments, **values)` would have run."""

    kernel: "Launcher"
    grid: Grid
    arguments: tuple[Any, ...]
    values: Mapping[str, Any]


_written: list[Launch] | None = None


@contextlib.contextmanager
def written_down() -> Iterator[list[Launch]]:
    """While this lasts, kernels are not run: their launches are added to the list. Not for two threads at a time."""
    global _written
    _written = []
    try:
        yield _written
    finally:
        _written = None


@dataclass(eq=False)
class Launcher:
    """A jitted function and the configurations that it may run in.

    With more than one configuration a launch may be made several times over for measuring, so the function must give
    the same when it is repeated on the same arguments: nothing that it reads may it write, but what is `restored`.

    Attributes:
        function: what `triton.jit` made.
        configurations: values of its constexpr parameters, with warps and stages; the first is the default.
        key: names of parameters whose values, beside dtypes, a choice is made for. What varies from step to step must
            come in few values, such as powers of two.
        restored: names of parameters `[rows, ...]` that the function reads and writes, each with the name of the one
            that holds the numbers of those rows. They are as they were when measuring ends.
    """

    function: Any
    configurations: Sequence[Any] = (triton.Config({}),)
    key: tuple[str, ...] = ()
    restored: Mapping[str, str] = field(default_factory=dict)
    _chosen: dict[tuple[Any, ...], Any] = field(init=False, default_factory=dict)

    def __call__(self, grid: Grid, *arguments: Any, **values: Any) -> None:
        """Run on the current stream of the device of the first tensor."""
        if _written is not None:
            _written.append(Launch(self, grid, arguments, values))
            return
        device = next(argument.device for argument in (*arguments, *values.values()) if isinstance(argument, Tensor))
        if device.type != "cuda":
            self._run(self.configurations[0], grid, arguments, values)
        elif device.index == torch.cuda.current_device():
            self._run(self._configuration(device, grid, arguments, values), grid, arguments, values)
        else:
            with torch.cuda.device(device):
                self._run(self._configuration(device, grid, arguments, values), grid, arguments, values)

    def options(self, configuration: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a run in a configuration; what a launch gives goes before it."""
        return {**_OPTIONS, **configuration.all_kwargs(), **values}

    def _run(self, configuration: Any, grid: Grid, arguments: tuple[Any, ...], values: Mapping[str, Any]) -> None:
        self.function[grid](*arguments, **self.options(configuration, values))

    def _configuration(
        self, device: torch.device, grid: Grid, arguments: tuple[Any, ...], values: Mapping[str, Any]
    ) -> Any:
        if len(self.configurations) == 1:
            return self.configurations[0]
        dtypes = tuple([value.dtype for value in (*arguments, *values.values()) if isinstance(value, Tensor)])
        key = (device.index, dtypes, *[self._value(name, arguments, values) for name in self.key])
        if key not in self._chosen:
            if torch.cuda.is_current_stream_capturing():
                return self.configurations[0]
            self._chosen[key] = self.configurations[self._tuned(device, key[1:], grid, arguments, values)]
        return self._chosen[key]

    def _value(self, name: str, arguments: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
        """What a launch gives the parameter of a name."""
        return values[name] if name in values else arguments[self._places[name]]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.function.arg_names)}

    def _tuned(
        self,
        device: torch.device,
        key: tuple[Any, ...],
        grid: Grid,
        arguments: tuple[Any, ...],
        values: Mapping[str, Any],
    ) -> int:
        """Position of the best configuration, from the cache directory or by measuring."""
        path = entry(
            "triton",
            {
                "device": torch.cuda.get_device_name(device),
                "triton": triton.__version__,
                "kernel": self.function.cache_key,
                "configurations": [str(configuration) for configuration in self.configurations],
                "key": [str(part) for part in key],
            },
        )

        def measure(folder: Any) -> None:
            run = functools.partial(self._run, grid=grid, arguments=arguments, values=values)
            with self._restoring(arguments, values):
                times = [_milliseconds(functools.partial(run, configuration)) for configuration in self.configurations]
            if min(times) == float("inf"):
                raise RuntimeError(f"no configuration of {self.function.__name__} fits this device")
            best = times.index(min(times))
            logger.info("%s %s: %s", self.function.__name__, key, self.configurations[best])
            (folder / "tuning.json").write_text(
                json.dumps({"best": best, "milliseconds": [min(t, 1e9) for t in times]})
            )

        return int(json.loads((fill(path, measure) / "tuning.json").read_text())["best"])

    @contextlib.contextmanager
    def _restoring(self, arguments: tuple[Any, ...], values: Mapping[str, Any]) -> Iterator[None]:
        """When this ends, what is `restored` has the values that it has now."""
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, numbers in self.restored.items():
            tensor, rows = self._value(name, arguments, values), self._value(numbers, arguments, values).long()
            kept.append((tensor, rows, tensor[rows]))
        try:
            yield
        finally:
            for tensor, rows, before in kept:
                tensor[rows] = before


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time of a run; infinite where the device has not the memory for it."""
    try:
        return float(do_bench(run, **_TUNING_MILLISECONDS, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
