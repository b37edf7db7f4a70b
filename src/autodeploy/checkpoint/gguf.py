"""GGUF files: one goes in, a Hugging Face checkpoint folder of the same model comes out, made once and cached.

transformers' own GGUF reader does the work (weights dequantised, tokenizer and chat template rebuilt); the folder is
then like any other, and a second start reads safetensors instead of dequantising again.
"""

import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autodeploy import cache_dir
from autodeploy.errors import CheckpointError

logger = logging.getLogger(__name__)

LAYOUT = 1
"""Raised when this file writes folders differently, so that old ones are not used."""


def transcribe_gguf(path: Path, dtype: torch.dtype) -> Path:
    """The checkpoint folder for a GGUF file with weights in `dtype`; takes up to a minute the first time.

    The file is known by its path, size and modification time. Needs memory for all weights in `dtype` while it runs.

    Raises:
        CheckpointError: no GGUF file, a damaged one, or an architecture that transformers cannot read from GGUF.
    """
    path = path.resolve()
    _check_magic(path)
    status = path.stat()
    key = {
        "layout": LAYOUT,
        "path": str(path),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "dtype": str(dtype),
        "transformers": version("transformers"),
        "gguf": version("gguf"),
    }
    folder = cache_dir.entry("gguf", key)
    if folder.is_dir():
        return folder
    logger.warning("reading %s for the first time; this takes up to a minute, later starts are fast", path)
    return cache_dir.fill(folder, lambda temporary: _transcribe(path, dtype, temporary))


def _transcribe(path: Path, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # a later start does without

    try:
        with warnings.catch_warnings():
            # numpy warns on the reader's views of the mapped, read-only file
            warnings.filterwarnings("ignore", category=UserWarning, message=".*not writable.*")
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, **_dequantised()
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises whatever it stumbles over, and the file is the user's
        raise CheckpointError(
            f"{path} could not be read as GGUF by transformers {version('transformers')}: "
            f"{type(error).__name__}: {error}; use the model's safetensors checkpoint instead"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_quantisation(folder / "config.json")


def _dequantised() -> dict[str, Any]:
    """Ask for plain weights. Needed where transformers can keep GGUF blocks (from 5.19 on), unknown before."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _drop_quantisation(config_file: Path) -> None:
    """The saved weights are plain, so the config must not call them quantised."""
    config = json.loads(config_file.read_text())
    if config.pop("quantization_config", None) is not None:
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file: it starts with {magic!r}, expected b'GGUF'")
