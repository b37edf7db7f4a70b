"""Loading: recipes and a reader go in, final tensors on their device come out, within the memory there is.

Each weight is read once and written straight into its final tensor, so that the peak is the final weights plus the
sources of one recipe part.
"""

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from autodeploy.checkpoint.kept import KeptWeights, OpenWeights
from autodeploy.checkpoint.recipe import Quantize, ReadTensor, Recipe, evaluate, evaluate_quantized
from autodeploy.errors import OutOfMemoryError
from autodeploy.memory import available_bytes, huge_pages

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called as `progress(bytes_done, bytes_total)` after each weight."""

GIB = 1024**3
ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


def load_weights(
    recipes: Mapping[str, Recipe],
    read: ReadTensor,
    *,
    device: torch.device,
    progress: Progress | None = None,
    kept: KeptWeights | None = None,
) -> dict[str, Tensor]:
    """Make every recipe's tensor, contiguous, on `device`, in the recipe's dtype.

    Names with equal recipes share one tensor. Weights are made in the order of their first source, which is close to
    the order in which checkpoints store them; the result keeps the order of `recipes`. `read` is called by one thread
    at a time; what it gives is copied by several, as touching new memory and mapped files takes longer than copying.

    Args:
        kept: where quantised weights are taken from, if an earlier start has left them there, else left for a later
            one.
    Raises:
        OutOfMemoryError: the weights do not fit the device's free memory; nothing has been read then.
        CheckpointError: from `read`, or for a source of the wrong shape.
    """
    distinct = sorted(set(recipes.values()), key=lambda recipe: _natural_key(recipe.sources()[0]))
    total_bytes = sum(weight_bytes(recipe) for recipe in distinct)
    _check_fits(total_bytes, device)
    loaded = _allocate(distinct, device)
    reading = threading.Lock()

    def read_alone(name: str) -> Tensor:
        with reading:
            return read(name)

    quantized = [recipe for recipe in distinct if isinstance(recipe, Quantize)]
    is_inference = torch.is_inference_mode_enabled()  # holds for one thread; tensors made under it want it again

    def make(recipes: Sequence[Recipe], opened: OpenWeights | None) -> int:
        parts = {recipe: loaded[recipe] for recipe in recipes if isinstance(recipe, Quantize)}
        with torch.inference_mode(is_inference):
            if parts and not (opened is not None and _read_kept(opened, parts)):
                evaluate_quantized(parts, read_alone)
            elif not parts:
                evaluate(recipes[0], read_alone, loaded[recipes[0]])
        return sum(map(weight_bytes, recipes))

    done_bytes = 0
    with (
        contextlib.nullcontext() if kept is None else kept.opened(quantized) as opened,
        ThreadPoolExecutor(torch.get_num_threads() if device.type == "cpu" else 1) as pool,
    ):
        for made_bytes in pool.map(partial(make, opened=opened), _made_together(distinct)):
            done_bytes += made_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    if kept is not None and opened is None:
        kept.save({recipe: loaded[recipe] for recipe in quantized})
    return {name: loaded[recipe] for name, recipe in recipes.items()}


def _read_kept(opened: OpenWeights, parts: Mapping[Quantize, Tensor]) -> bool:
    """Whether the parts could be read as they were kept."""
    try:
        for recipe, out in parts.items():
            opened.read(recipe, out)
    except OSError as error:
        logger.warning("kept weights cannot be read (%s); quantising anew", error)
        return False
    return True


def _made_together(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """The recipes in their order, parts of one quantised matrix together."""
    groups: dict[object, list[Recipe]] = {}
    for recipe in recipes:
        key = (recipe.of, recipe.number_format) if isinstance(recipe, Quantize) else recipe
        groups.setdefault(key, []).append(recipe)
    return list(groups.values())


def _allocate(recipes: Sequence[Recipe], device: torch.device) -> dict[Recipe, Tensor]:
    """A tensor for each recipe. On the CPU they share one block of huge pages: a step reads every weight once, and with
    ordinary pages address translation alone costs a tenth of that time or more.
    """
    if device.type != "cpu":
        return {recipe: torch.empty(recipe.shape, dtype=recipe.dtype, device=device) for recipe in recipes}
    starts, end = [], 0
    for recipe in recipes:
        starts.append(end)
        end += -(-weight_bytes(recipe) // ALIGNMENT) * ALIGNMENT
    block = huge_pages(end)
    return {
        recipe: block[start : start + weight_bytes(recipe)].view(recipe.dtype).view(recipe.shape)
        for recipe, start in zip(recipes, starts, strict=True)
    }


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.9` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def weight_bytes(recipe: Recipe) -> int:
    """Bytes of the recipe's final tensor."""
    return torch.empty(recipe.shape, dtype=recipe.dtype, device="meta").nbytes


def _check_fits(needed: int, device: torch.device) -> None:
    available = available_bytes(device)
    if needed > available:
        raise OutOfMemoryError(
            f"the weights need {needed / GIB:.2f} GiB, {available / GIB:.2f} GiB are available on {device}; take a "
            "smaller dtype or model, or free memory"
        )
