"""Backends by name: a lowered graph and the name of a backend go in, a function of one step comes out."""

from collections.abc import Callable, Sequence

import torch

from autodeploy.compile.capture import Capture, CudaCapture
from autodeploy.compile.cuda_graph import compile_cuda_graph
from autodeploy.compile.eager import compile_eager
from autodeploy.compile.program import ChooseTokens, GraphFunction
from autodeploy.compile.replay import compile_replay
from autodeploy.compile.streams import CudaStreams, Streams
from autodeploy.errors import ConfigError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.kernels.provider import unavailable


def resolve_backend(wanted: str, device: torch.device) -> str:
    """The compile backend that `wanted` stands for; `auto` repeats steps where that can be done.

    Raises:
        ConfigError: a backend that this device has not.
    """
    if wanted == "auto" and device.type == "cuda":
        return "torch-cudagraph"
    require_backend(wanted, device)
    if wanted not in ("auto", "replay"):
        return wanted
    lacking = unavailable(device) if device.type == "cpu" else {device.type: "kernels on this device are not repeated"}
    if wanted == "auto":
        return "torch-simple" if lacking else "replay"
    if lacking:
        why = "; ".join(lacking.values())
        raise ConfigError(f"compile_backend='replay' repeats native CPU kernels: {why}; use 'torch-simple'")
    return wanted


def require_backend(wanted: str, device: torch.device) -> None:
    """Raises ConfigError, before anything is built, for a backend that captures graphs where there are none."""
    if wanted in ("torch-cudagraph", "torch-opt"):
        graph_capture(device)


def graph_capture(device: torch.device) -> Callable[[], Capture]:
    """What captures graphs on a device. Raises ConfigError where there are none."""
    if device.type != "cuda":
        raise ConfigError(
            f"compile_backend='torch-cudagraph' and 'torch-opt' capture CUDA graphs, and the device is {device.type}; "
            "use 'auto', or device='cuda'"
        )
    return lambda: CudaCapture(device)


def second_stream(device: torch.device) -> Streams:
    """Streams of a device that captures graphs."""
    return CudaStreams(device)


def compile_graph(
    graph: ModelGraph,
    backend: str,
    device: torch.device,
    report: BuildReport,
    capture_sizes: Sequence[int] | None = None,
    choose: ChooseTokens | None = None,
) -> GraphFunction:
    """A function of a lowered graph's inputs in order, by a backend's name; the graph holds its weights.

    One that captures CUDA graphs is a `GraphedFunction`, which is to be prepared.

    Args:
        capture_sizes: see the option `cudagraph_capture_sizes`.
        choose: kernel with which CUDA graphs choose tokens.
    """
    if backend == "torch-simple":
        return compile_eager(graph)
    if backend == "replay":
        return compile_replay(graph, report)
    if backend == "torch-cudagraph":
        new_capture, streams = graph_capture(device), second_stream(device)
        return compile_cuda_graph(graph, device, report, new_capture, capture_sizes, None, streams, choose)
    # Importing Inductor takes a second that others need not pay.
    from autodeploy.compile.inductor import compile_inductor, region_compiler

    if backend == "torch-opt":
        compiler = region_compiler(graph)
        return compile_cuda_graph(graph, device, report, graph_capture(device), capture_sizes, compiler, None, choose)
    return compile_inductor(graph, report)
