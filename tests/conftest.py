"""What every test gets: a cache of its own and no network; without a GPU, no GPU tests and an interpreter of Triton."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read by Hugging Face libraries when they are imported, so set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read by Triton when a kernel is declared: without a device, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a GPU machine may lack it; `make test-gpu` collects no file that imports it
    pass
else:
    # Deadlines measure the neighbours of a shared machine. In CI the examples are the same every time.
    settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds of one test session never see what an earlier session or a user left in the cache.

    Where several processes run the tests, all have one cache, so that the kernels are compiled once.
    """
    is_shared = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "cache" if is_shared else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTODEPLOY_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; skips where its package is not installed."""
    return _real_model("smollm2")


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """The GGUF file of Gemma-3-270M; skips where its package is not installed."""
    return _real_model("gemma3-270m")


def _real_model(name: str) -> Path:
    from autodeploy.errors import ModelNotFoundError
    from autodeploy.packaged_models import locate_model

    try:
        return locate_model(name)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-requests", type=int, default=150, help="malformed requests sent to a server; make fuzz")


def pytest_configure(config: pytest.Config) -> None:
    """With `-m gpu`, warnings are shown and are no errors: a GPU machine has versions of its own, which warn of other
    things, as torch does of what a device could do faster.
    """
    if config.option.markexpr == "gpu":
        config.addinivalue_line("filterwarnings", "default")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, leave out files and folders without a GPU test: a GPU machine need not have what they import."""
    if config.option.markexpr != "gpu" or collection_path.name == "conftest.py":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))
