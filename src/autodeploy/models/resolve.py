"""Resolving: what the user calls a model goes in, its config, files and facts come out, before anything is built.

A model is a checkpoint folder, a `.gguf` file or a hub id. Code that ships inside a checkpoint runs only with
`trust_remote_code=True`, and this file and `instantiate.py` are the only places that could run it.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from autodeploy.checkpoint.files import find_weight_files, open_weight_file
from autodeploy.checkpoint.gguf import transcribe_gguf
from autodeploy.config import ModelOptions
from autodeploy.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from autodeploy.models.config_overrides import apply_overrides

HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
HUB_FILES_LEFT = ("original/*", "consolidated*", "onnx/*", "runs/*", "optimizer*", "training_args*")
"""second copies of the weights in another layout, and traces of training"""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
"""What configs call the longest context, most common first."""

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model that exists, with every `auto` turned into a fact.

    Attributes:
        name: hub id, folder name or file name, for people.
        folder: checkpoint folder with config and tokenizer; for a GGUF file its transcript in the cache.
        config: the Hugging Face config, `model_kwargs` applied.
        weight_files: safetensors or pickle files; empty with `load_format="dummy"`.
        dtype: of weights and activations.
        eos_token_ids: ids that end a generation; empty when neither config says.
        max_model_len: longest context in tokens, the user's or the config's; None when neither says.
        generation_defaults: sampling fields of `generation_config.json`, as far as it has them.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    weight_files: tuple[Path, ...]
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...] = ()
    max_model_len: int | None = None
    generation_defaults: dict[str, Any] = field(default_factory=dict)


def resolve_model(model: str, options: ModelOptions) -> ResolvedModel:
    """Find a model and what must be known to build it; reads no weights (a GGUF file's first use excepted).

    Args:
        model: a checkpoint folder, a `.gguf` file, or a hub id, looked for in this order.

    Raises:
        ModelNotFoundError: nothing of that name, with what was tried.
        CheckpointError: a folder without config, weights where they are wanted, or with damaged files.
        UnsupportedModelError: a model type that transformers does not know, or quantised weights.
        ConfigError: `model_kwargs` or `max_model_len` that do not go with the model.
    """
    folder = _find_folder(model, options)
    config = _load_config(folder, options)
    weight_files = () if options.load_format == "dummy" else find_weight_files(folder)
    if not weight_files and options.load_format != "dummy":
        raise CheckpointError(
            f"{folder} has a config but no weights (*.safetensors; in a local folder also *.bin); complete it, or pass "
            "load_format='dummy' to run with random weights"
        )
    generation = _read_json(folder / GENERATION_CONFIG_NAME) if (folder / GENERATION_CONFIG_NAME).is_file() else {}
    return ResolvedModel(
        name=Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model,
        folder=folder,
        config=config,
        weight_files=weight_files,
        dtype=_resolve_dtype(config, weight_files, options.dtype),
        eos_token_ids=eos_token_ids(config, generation),
        max_model_len=max_model_len(config, options.max_model_len),
        generation_defaults={k: generation[k] for k in SAMPLING_FIELDS if generation.get(k) is not None},
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


def _load_config(folder: Path, options: ModelOptions) -> PreTrainedConfig:
    if not (folder / CONFIG_NAME).is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; give the file itself, e.g. {folder / ggufs[0]}" if ggufs else "; is it the folder of a checkpoint?"
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}{hint}")
    stored = _read_json(folder / CONFIG_NAME)
    model_type = stored.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known and not options.trust_remote_code:
        advice = "use a newer transformers"
        if "auto_map" in stored:
            advice = "it brings its own code: read that, and pass trust_remote_code=True to run it"
        raise UnsupportedModelError(f"{folder / CONFIG_NAME} has the unknown model_type {model_type!r}; {advice}")
    if stored.get("quantization_config") and options.load_format != "dummy":
        raise UnsupportedModelError(
            f"{folder} holds quantised weights ({stored['quantization_config']}); use the unquantised checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # a config class, possibly the checkpoint's own, refuses in its own ways
        raise CheckpointError(f"{folder / CONFIG_NAME} is not a valid {model_type} config: {error}") from error
    return apply_overrides(config, options.model_kwargs)


def _resolve_dtype(config: PreTrainedConfig, weight_files: tuple[Path, ...], wanted: str) -> torch.dtype:
    """What the user wants, else what the config says, else what the first floating-point weight has."""
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    for dtype in (config.dtype, config.get_text_config().dtype):
        if isinstance(dtype, torch.dtype):
            return dtype
    for file in weight_files:
        for tensor in open_weight_file(file).tensors.values():
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def eos_token_ids(config: PreTrainedConfig, generation: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: what the generation config says, else the model's config; empty when neither does."""
    for source in (generation, config.to_dict(), config.get_text_config().to_dict()):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def max_model_len(config: PreTrainedConfig, wanted: int | None) -> int | None:
    """Longest context in tokens: what is wanted, else what the model was made for; None when neither says.

    Raises:
        ConfigError: more is wanted than the model was made for.
    """
    values = config.get_text_config().to_dict()
    made_for = next((values[name] for name in LENGTH_FIELDS if isinstance(values.get(name), int)), None)
    if wanted is None or made_for is None:
        return wanted or made_for
    if wanted > made_for:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {made_for} tokens this model was made for; lower it, or set "
            "the rope scaling you want through model_kwargs"
        )
    return wanted


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value
