"""Locating: what the user calls a model goes in, its folder, files and stored config come out; nothing is built.

A model is a checkpoint folder, a `.gguf` file or a hub id. Nothing here imports transformers, which takes longer than
starting a model whose graph was kept (`graph_cache.py`).
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME

from autodeploy.checkpoint.files import StoredTensors, find_weight_files
from autodeploy.checkpoint.gguf import transcribe_gguf
from autodeploy.config import ModelOptions
from autodeploy.errors import CheckpointError, ModelNotFoundError

GENERATION_CONFIG_NAME = "generation_config.json"

HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
HUB_FILES_LEFT = ("original/*", "consolidated*", "onnx/*", "runs/*", "optimizer*", "training_args*")
"""second copies of the weights in another layout, and traces of training"""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class LocatedModel:
    """A model that exists, as far as its files tell without transformers.

    Attributes:
        name: hub id, folder name or file name, for people.
        folder: checkpoint folder with config and tokenizer; for a GGUF file its transcript in the cache.
        weight_files: safetensors or pickle files; empty with `load_format="dummy"`.
        config: the stored `config.json`.
        generation: the stored `generation_config.json`; empty when there is none.
    """

    name: str
    folder: Path
    weight_files: tuple[Path, ...]
    config: dict[str, Any]
    generation: dict[str, Any]

    @functools.cached_property
    def stored(self) -> StoredTensors:
        """The tensors in the weight files, whose headers are read when this is first asked for, and once."""
        return StoredTensors(self.weight_files)

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Sampling fields of the generation config, as far as it has them."""
        return {k: self.generation[k] for k in SAMPLING_FIELDS if self.generation.get(k) is not None}


def locate_model(model: str, options: ModelOptions) -> LocatedModel:
    """Find a model's files; reads no weights (a GGUF file's first use excepted).

    Args:
        model: a checkpoint folder, a `.gguf` file, or a hub id, looked for in this order.

    Raises:
        ModelNotFoundError: nothing of that name, with what was tried.
        CheckpointError: a folder without config, weights where they are wanted, or with damaged files.
    """
    folder = _find_folder(model, options)
    if not (folder / CONFIG_NAME).is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; give the file itself, e.g. {folder / ggufs[0]}" if ggufs else "; is it the folder of a checkpoint?"
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}{hint}")
    config = _read_json(folder / CONFIG_NAME)
    weight_files = () if options.load_format == "dummy" else find_weight_files(folder)
    if not weight_files and options.load_format != "dummy":
        raise CheckpointError(
            f"{folder} has a config but no weights (*.safetensors; in a local folder also *.bin); complete it, or pass "
            "load_format='dummy' to run with random weights"
        )
    return LocatedModel(
        name=Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model,
        folder=folder,
        weight_files=weight_files,
        config=config,
        generation=_read_json(folder / GENERATION_CONFIG_NAME) if (folder / GENERATION_CONFIG_NAME).is_file() else {},
    )


def _find_folder(model: str, options: ModelOptions) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{path} is a file but not a .gguf file; give the checkpoint folder it lies in")
        return transcribe_gguf(path, torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype))
    if not HUB_ID.fullmatch(model) or path.suffix.lower() == ".gguf":
        raise ModelNotFoundError(
            f"no such model: {model!r} is neither a folder nor a file here, and cannot be a hub id (owner/name); "
            "check the path"
        )
    return _download(model, options)


def _download(model: str, options: ModelOptions) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*HUB_FILES, *(["*.py"] if options.trust_remote_code else [])]
    try:
        folder = snapshot_download(
            model, revision=options.revision, allow_patterns=patterns, ignore_patterns=list(HUB_FILES_LEFT)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # OSError: no network and nothing in the hub's cache
        at = f" at revision {options.revision!r}" if options.revision else ""
        raise ModelNotFoundError(
            f"no such model: {model!r} is not a folder or file here (looked in {Path.cwd()}), and could not be had "
            f"from the Hugging Face hub{at}: {error}; check the name and the network, or log in for a gated model"
        ) from error
    return Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value
