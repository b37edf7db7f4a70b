"""Reading weights by the module's own names: a module and its weight files go in, `read(name)` comes out.

Three readers answer the same call: `CheckpointIndex` from files, `ModuleReader` from a live module, `DummyReader` from
nothing. What Hugging Face checkpoints call a tensor, and how they split or stack it, is transformers' own knowledge
(its conversion mapping); it is asked here, tensor by tensor, so that a model never exists twice.
"""

import copy
import functools
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from autodeploy.checkpoint.files import StoredTensors
from autodeploy.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass
class _Conversion:
    """Stored tensors that become one or more of the module's: by themselves, or through transformers' converter."""

    target: str
    converter: WeightConverter | None
    stored: list[tuple[str, str]] = field(default_factory=list)
    """(the converter's source pattern, stored name), in the order the converter wants them"""

    def run(self, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Module name -> tensor. On meta tensors this gives names and shapes without reading data."""
        if self.converter is None:
            return {self.target: read(self.stored[0][1])}
        for pattern, name in self.stored:
            # the converter calls it when it comes to it; it declares futures only, but takes callables on purpose
            read_later: Any = functools.partial(read, name)
            self.converter.add_tensor(self.target, name, pattern, read_later)
        converted = self.converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class CheckpointIndex:
    """Weight files, seen through the state-dict names of `model`; no tensor is read before it is asked for.

    Tied weights read whichever of their names the checkpoint holds, and buffers that it does not hold are the module's.
    """

    def __init__(self, stored: StoredTensors, model: nn.Module) -> None:
        """Find what each stored tensor becomes in `model` (parameters may be meta).

        Raises:
            CheckpointError: stored tensors that do not convert to what the model wants.
        """
        self._model = model
        self._stored = stored
        self._file_of = stored.file_of
        self._expected: dict[str, Tensor] = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._tied = _tied_names(model)
        self._converted: dict[str, Tensor] = {}
        """what the latest conversion made beyond what was asked for; the next reads usually want it"""
        self._plan: dict[str, _Conversion] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for conversion in _plan_conversions(self._file_of, self._expected, model):
            for name, tensor in self._run_on_meta(conversion).items():
                self._plan.setdefault(name, conversion)
                self._shapes.setdefault(name, tuple(tensor.shape))

    def check(self) -> tuple[str, ...]:
        """Compare the checkpoint with the model, before any weight is read.

        Returns:
            Names, as the module would call them, of stored tensors that the model has no place for.

        Raises:
            CheckpointError: a weight that is missing, has another shape than the model's, or is tied to another one
                by the config but stored with different values.
        """
        absent = [name for name in self._expected if self._held_name(name) is None]
        missing = [name for name in absent if name not in self._buffers]
        if missing:
            files = ", ".join(str(file.path) for file in self._stored.files)
            raise CheckpointError(
                f"{len(missing)} of the model's {len(self._expected)} weights are missing, the first is {missing[0]!r} "
                f"{list(self._expected[missing[0]].shape)}, not found in {files}; the files are incomplete or belong "
                "to another model"
            )
        if absent:
            logger.info("buffers not in the checkpoint, taken from the module: %s", ", ".join(absent))
        for name, shape in self._shapes.items():
            if name in self._expected and shape != tuple(self._expected[name].shape):
                raise CheckpointError(
                    f"weight {name!r} has shape {list(shape)} in {self._described(name)}, the config makes it "
                    f"{list(self._expected[name].shape)}; check that weights and config belong together"
                )
        self._check_ties()
        return self._unexpected()

    def read(self, name: str) -> Tensor:
        """The tensor of that name in the module's state dict (or a buffer), on the CPU, in the stored dtype.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        held = self._held_name(name)
        if held is None:
            if name in self._buffers:
                return self._buffers[name]
            raise CheckpointError(f"no weight {name!r} in {', '.join(str(file.path) for file in self._stored.files)}")
        if held not in self._converted:
            self._converted = {}
            self._converted = self._plan[held].run(self._stored.read, self._model)
        return self._converted.pop(held)

    def stored_names(self, names: Iterable[str]) -> dict[str, str] | None:
        """Module name -> stored name, when each of them is one stored tensor as it is; else None."""
        if any(name in self._plan and other in self._plan for name, tied in self._tied.items() for other in tied):
            return None  # whether both hold the same values must be looked at anew
        found: dict[str, str] = {}
        for name in names:
            held = self._held_name(name)
            if held is None or self._plan[held].converter is not None:
                return None
            found[name] = self._plan[held].stored[0][1]
        return found

    def _held_name(self, name: str) -> str | None:
        """`name`, or the name it is tied to that the checkpoint holds, or None."""
        candidates = (name, *self._tied.get(name, ()))
        return next((candidate for candidate in candidates if candidate in self._plan), None)

    def _run_on_meta(self, conversion: _Conversion) -> dict[str, Tensor]:
        try:
            return conversion.run(lambda name: self._file_of[name].tensors[name], self._model)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            stored = [f"{name} {list(self._file_of[name].tensors[name].shape)}" for _, name in conversion.stored[:8]]
            raise CheckpointError(
                f"weight {conversion.target!r} cannot be made from {', '.join(stored)} in "
                f"{self._file_of[conversion.stored[0][1]].path}: {error}; check that weights and config belong together"
            ) from error

    def _described(self, name: str) -> str:
        stored = [stored_name for _, stored_name in self._plan[name].stored]
        made_from = "" if stored == [name] else f" (made of {len(stored)} tensors, the first is {stored[0]!r})"
        return f"{self._file_of[stored[0]].path}{made_from}"

    def _check_ties(self) -> None:
        for name, others in self._tied.items():
            for other in others:
                both_held = name < other and name in self._plan and other in self._plan
                if both_held and not torch.equal(self.read(name), self.read(other)):
                    raise CheckpointError(
                        f"the config ties {name!r} to {other!r}, but the checkpoint stores different values for them; "
                        "pass model_kwargs={'tie_word_embeddings': False} to use both"
                    )

    def _unexpected(self) -> tuple[str, ...]:
        ignored: Sequence[str] = ()
        if isinstance(self._model, PreTrainedModel):
            ignored = tuple(self._model._keys_to_ignore_on_load_unexpected or ())
        names = (name for name in self._plan if name not in self._expected)
        return tuple(name for name in names if not any(re.search(pattern, name) for pattern in ignored))


class ModuleReader:
    """Reads the weights of a live module, e.g. a user's own with its weights in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = _named_tensors(module)

    def read(self, name: str) -> Tensor:
        """The module's own tensor, not a copy. Raises CheckpointError for an unknown name or one without data."""
        if name not in self._tensors:
            raise CheckpointError(f"the module has no parameter or buffer {name!r}")
        if self._tensors[name].is_meta:
            raise CheckpointError(f"weight {name!r} is on the meta device and has no values; load the module first")
        return self._tensors[name]


class DummyReader:
    """Makes up small random weights, the same for the same name and shape, of a size that keeps outputs finite."""

    _BLOCK = 1_000_003
    """values drawn per tensor, then repeated; a prime, so that no two rows of a matrix are equal"""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = _named_tensors(module)
        self._tied = _tied_names(module)

    def read(self, name: str) -> Tensor:
        """Normal around 0 with deviation 0.02, vectors called `weight` (norms) around 1; buffers are the module's own.

        Raises:
            CheckpointError: the module has no such parameter or buffer.
        """
        if name not in self._tensors:
            raise CheckpointError(f"the module has no parameter or buffer {name!r}")
        like = self._tensors[name]
        if not like.is_floating_point() or not isinstance(like, nn.Parameter):
            return like if not like.is_meta else torch.zeros(like.shape, dtype=like.dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(min(name, *self._tied.get(name, (name,))).encode()))
        block = torch.randn(min(like.numel(), self._BLOCK), generator=generator) * 0.02
        if like.ndim == 1 and name.endswith("weight"):
            block += 1.0
        values = torch.empty(like.numel(), dtype=like.dtype)
        for start in range(0, like.numel(), self._BLOCK):
            part = values[start : start + self._BLOCK]
            part.copy_(block[: part.numel()])
        return values.view(like.shape)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones under each of their names."""
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def _tied_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that has several names: name -> its other names."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in names_of.values()
        if len(names) > 1
        for name in names
    }


def _plan_conversions(stored: Iterable[str], expected: dict[str, Tensor], model: nn.Module) -> list[_Conversion]:
    """What each stored tensor goes into. Follows transformers' loading: renamings, then at most one converter."""
    if not isinstance(model, PreTrainedModel):
        return [_Conversion(name, None, [(name, name)]) for name in stored]
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions: dict[str, _Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:  # it has the module's name already
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if pattern is None or target not in expected:
            conversions.setdefault(target, _Conversion(target, None, [(name, name)]))
            continue
        if target not in conversions:
            # each target collects tensors of its own
            conversions[target] = _Conversion(target, copy.deepcopy(by_pattern[pattern]))
        conversions[target].stored.append((pattern, name))
    return list(conversions.values())
