"""Weight files: a folder goes in, out come its weight files, and from each file names, shapes and lazily read tensors.

Safetensors files are memory-mapped. Pickle files (`.bin`, `.pt`, `.pth`) are read by `torch.load(weights_only=True)`
only, which runs no code out of the file.
"""

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.constants import PYTORCH_WEIGHTS_NAME, SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autodeploy.errors import CheckpointError
from autodeploy.memory import forget_pages

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

PYTORCH_INDEX_FILE = f"{PYTORCH_WEIGHTS_NAME}.index.json"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

MOST_MAPPED_BYTES = 64 * 2**20
"""Pages of a mapped file count as memory of the process: after so many bytes they are given back."""


NAMES = ((SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE), (PYTORCH_INDEX_FILE, PYTORCH_WEIGHTS_NAME))
"""(index of several files, single file), in the order they are looked for"""


class WeightFile(Protocol):
    """One file of weights.

    Attributes:
        path: the file.
        tensors: every tensor it holds as a tensor on the meta device (name, shape and dtype, no data).
    """

    path: Path
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """The tensor's data on the CPU, to be read only; may be a view of the mapped file."""

    def close(self) -> None:
        """Let go of the file; a later `read` opens it again. Tensors already handed out stay valid."""


def open_weight_file(path: Path) -> WeightFile:
    """Open a weight file by its suffix, reading names and shapes only.

    Raises:
        CheckpointError: the file is damaged, holds more than plain tensors, or is of no known kind.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleFile(path)
    raise CheckpointError(f"{path} is no weight file; expected .safetensors or {', '.join(PICKLE_SUFFIXES)}")


class SafetensorsFile:
    """A safetensors file, mapped into memory from the first `read` until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self._handle: Any = None  # safetensors ships no types
        self._read_bytes = 0  # since pages were last given back
        handle = self._open()
        for name in handle.keys():  # noqa: SIM118  (a file handle, not a dict)
            stored = handle.get_slice(name)
            if stored.get_dtype() not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"tensor {name!r} in {path} has the unknown dtype {stored.get_dtype()}")
            dtype = SAFETENSORS_DTYPES[stored.get_dtype()]
            self.tensors[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        if self._handle is None:
            self._handle = self._open()
        tensor: Tensor = self._handle.get_tensor(name)
        self._read_bytes += tensor.nbytes
        if self._read_bytes > MOST_MAPPED_BYTES:
            forget_pages(tensor.data_ptr(), self.path)
            self._read_bytes = 0
        return tensor

    def close(self) -> None:
        self._handle = None
        self._read_bytes = 0

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"weight file {self.path} is missing; copy or download it again") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read as safetensors: {_first_cut_tensor(self.path) or error}; "
                "copy or download it again"
            ) from error


class PickleFile:
    """A pickled state dict, read without running any code of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Tensor] | None = self._load()
        self.tensors = {name: tensor.to("meta") for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        if self._state is None:
            self._state = self._load()
        return self._state[name]

    def close(self) -> None:
        self._state = None

    def _load(self) -> dict[str, Tensor]:
        try:
            state = _torch_load(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(f"weight file {self.path} is missing; copy or download it again") from error
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"it would run {refused.group(1)}" if refused else "it holds more than tensors"
            raise CheckpointError(
                f"{self.path} is refused: {what}. Pickle files are read for plain tensors only; "
                "save the weights as safetensors"
            ) from None  # torch's own message advises weights_only=False
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); copy or download it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{self.path} holds no plain state dict (name -> tensor); save `model.state_dict()`")
        return state


class RenamedFile:
    """Some tensors of a file under other names, given as {name there: name in the file}; a `WeightFile`."""

    def __init__(self, file: WeightFile, names: Mapping[str, str]) -> None:
        self.path = file.path
        self.tensors = {new: file.tensors[old] for new, old in names.items() if old in file.tensors}
        self._file, self._names = file, names

    def read(self, name: str) -> Tensor:
        return self._file.read(self._names[name])

    def close(self) -> None:
        self._file.close()


class StoredTensors:
    """The tensors of several weight files by their stored names. At most one file is kept open."""

    def __init__(self, weight_files: Sequence[Path]) -> None:
        """Read names, shapes and dtypes. Raises CheckpointError for a damaged file."""
        self.files = [open_weight_file(path) for path in weight_files]
        self.file_of = {name: file for file in self.files for name in file.tensors}
        self._open: WeightFile | None = None

    def read(self, name: str) -> Tensor:
        """The data of a stored tensor, on the CPU, in the stored dtype."""
        file = self.file_of[name]
        if self._open is not None and self._open is not file:
            self._open.close()  # unmaps what has been read, so that the process holds one file at a time
        self._open = file
        return file.read(name)

    def renamed(self, names: Mapping[str, str]) -> "StoredTensors":
        """Some of these tensors under other names, given as {name there: name here}."""
        view = StoredTensors(())
        view.files = [RenamedFile(file, names) for file in self.files]
        view.file_of = {name: file for file in view.files for name in file.tensors}
        return view

    def fingerprint(self) -> str:
        """A hash of every tensor's name, shape and dtype: what a graph can depend on, values left out."""
        described = sorted(
            (name, list(file.tensors[name].shape), str(file.tensors[name].dtype)) for name, file in self.file_of.items()
        )
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a checkpoint folder, safetensors before pickle, sharded or single; empty when it has none.

    Raises:
        CheckpointError: an index file that is damaged, or names a file that is missing or outside the folder.
    """
    for index_name, single_name in NAMES:
        if (folder / index_name).is_file():
            return _sharded_files(folder / index_name)
        if (folder / single_name).is_file():
            return (folder / single_name,)
    for suffix in (".safetensors", *PICKLE_SUFFIXES):  # one file under a name of its own is clear enough
        candidates = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        if len(candidates) > 1:
            names = ", ".join(path.name for path in candidates)
            raise CheckpointError(
                f"{folder} holds {names} and no {SAFETENSORS_INDEX_FILE} saying which belong together"
            )
        if candidates:
            return (candidates[0],)
    return ()


def _sharded_files(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of weight files ({error!r}); copy or download it again") from error
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{index} names {name!r}; weight files must lie inside the checkpoint folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing; copy or download it again")
    return tuple(index.parent / name for name in sorted(names))


def _torch_load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # files of torch < 1.6 are not, and cannot be mapped
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what cannot be read raises anyway
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _first_cut_tensor(path: Path) -> str | None:
    """What is missing at the end of a safetensors file, or None when that is not what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > size - 8:
            return f"the file ends within its header, after {size:,} bytes"
        try:
            header = json.loads(file.read(header_bytes))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    cut = [(end, name) for name, end in ends.items() if end > size - 8 - header_bytes]
    if not cut:
        return None
    end, name = min(cut)
    return f"the file is cut short, tensor {name!r} ends at byte {end + 8 + header_bytes:,} of {size:,}"
