"""Loading: recipes and a reader go in, final tensors on their device come out, within the memory there is.

Each weight is read once and written straight into its final tensor, so that the peak is the final weights plus the
sources of one recipe part.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from autodeploy.checkpoint.recipe import ReadTensor, Recipe, evaluate
from autodeploy.errors import OutOfMemoryError
from autodeploy.memory import available_bytes

Progress = Callable[[int, int], None]
"""Called as `progress(bytes_done, bytes_total)` after each weight."""

GIB = 1024**3


def load_weights(
    recipes: Mapping[str, Recipe], read: ReadTensor, *, device: torch.device, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Make every recipe's tensor, contiguous, on `device`, in the recipe's dtype.

    Names with equal recipes share one tensor. Weights are made in the order of their first source, which is close to
    the order in which checkpoints store them; the result keeps the order of `recipes`.

    Raises:
        OutOfMemoryError: the weights do not fit the device's free memory; nothing has been read then.
        CheckpointError: from `read`, or for a source of the wrong shape.
    """
    distinct = sorted(set(recipes.values()), key=lambda recipe: dot_natural_key(recipe.sources()[0]))
    total_bytes = sum(weight_bytes(recipe) for recipe in distinct)
    _check_fits(total_bytes, device)
    loaded: dict[Recipe, Tensor] = {}
    done_bytes = 0
    for recipe in distinct:
        out = torch.empty(recipe.shape, dtype=recipe.dtype, device=device)
        loaded[recipe] = evaluate(recipe, read, out)
        done_bytes += weight_bytes(recipe)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return {name: loaded[recipe] for name, recipe in recipes.items()}


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
