import threading
import time

import pytest
import torch
from torch import Tensor

from autodeploy.checkpoint import load
from autodeploy.checkpoint.load import load_weights, weight_bytes
from autodeploy.checkpoint.quantize import NumberFormat, quantize_rows
from autodeploy.checkpoint.recipe import Cast, Concat, Quantize, Recipe, Source, Transpose
from autodeploy.errors import CheckpointError, OutOfMemoryError

CPU = torch.device("cpu")


def source(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Source:
    return Source(name, shape, dtype)


def numbers(name: str) -> Tensor:
    return torch.arange(6.0).view(2, 3) + ord(name[-1])


def test_makes_every_recipe_in_its_own_dtype_and_contiguous() -> None:
    recipes: dict[str, Recipe] = {
        "plain": source("a", 2, 3, dtype=torch.bfloat16),
        "fused": Concat((source("a", 2, 3), source("b", 2, 3)), 0),
        "turned": Cast(Transpose(source("b", 2, 3), 0, 1), torch.float64),
    }
    loaded = load_weights(recipes, numbers, device=CPU)
    assert list(loaded) == list(recipes)
    assert torch.equal(loaded["plain"], numbers("a").bfloat16())
    assert torch.equal(loaded["fused"], torch.cat([numbers("a"), numbers("b")]))
    assert torch.equal(loaded["turned"], numbers("b").T.double())
    assert all(tensor.is_contiguous() for tensor in loaded.values())


def test_weights_are_copies_unless_their_recipes_are_equal() -> None:
    kept = numbers("a")
    recipes = {"one": source("a", 2, 3), "two": source("a", 2, 3), "other": source("b", 2, 3)}
    loaded = load_weights(recipes, lambda name: kept, device=CPU)
    assert loaded["one"] is loaded["two"]
    kept.zero_()
    assert loaded["one"].any() and loaded["other"].any()


def test_reads_in_the_order_of_checkpoints_and_reports_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    order: list[str] = []
    progress: list[tuple[int, int]] = []
    names = ["layers.10.w", "layers.9.w", "embed.w", "layers.9.b"]

    def read(name: str) -> Tensor:
        order.append(name)
        return numbers(name)

    recipes = {name: source(name, 2, 3) for name in names}
    load_weights(recipes, read, device=CPU, progress=lambda done, total: progress.append((done, total)))
    assert order == ["embed.w", "layers.9.b", "layers.9.w", "layers.10.w"]
    assert progress == [(24, 96), (48, 96), (72, 96), (96, 96)]


def test_reads_one_at_a_time_and_raises_what_reading_raises() -> None:
    inside = threading.Lock()

    def read(name: str) -> Tensor:
        assert inside.acquire(blocking=False), "read is called by two threads at once"
        time.sleep(0.002)
        inside.release()
        return numbers(name)

    recipes = {f"w{index}": source(f"w{index}", 2, 3) for index in range(20)}
    loaded = load_weights(recipes, read, device=CPU)
    assert all(torch.equal(loaded[name], numbers(name)) for name in recipes)

    def broken(name: str) -> Tensor:
        raise CheckpointError(f"{name} is damaged")

    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(recipes, broken, device=CPU)


def test_parts_of_a_quantised_matrix_are_made_in_one_reading() -> None:
    matrix, read = source("a", 32, 64), []

    def stored(name: str) -> Tensor:
        read.append(name)
        return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    number_format = NumberFormat(4, 32, has_offsets=True)
    recipes: dict[str, Recipe] = {
        part: Quantize(matrix, number_format, part) for part in ("numbers", "scales", "offsets")
    }
    loaded = load_weights(recipes | {"plain": source("b", 32, 64)}, stored, device=CPU)
    assert sorted(read) == ["a", "b"]
    expected = quantize_rows(stored("a"), number_format)
    assert all(torch.equal(loaded[part], expected[part]) for part in recipes)


def test_loads_under_inference_mode_too() -> None:
    with torch.inference_mode():
        assert torch.equal(load_weights({"w": source("a", 2, 3)}, numbers, device=CPU)["w"], numbers("a"))


def test_too_little_memory_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "available_bytes", lambda device: 3 * 2**30)

    def read(name: str) -> Tensor:
        raise AssertionError("read, although it cannot fit")

    huge = {"w": Source("w", (2**20, 2**10), torch.float32)}  # 4 GiB
    with pytest.raises(OutOfMemoryError, match=r"4\.00 GiB.*3\.00 GiB are available on cpu.*dtype"):
        load_weights(huge, read, device=CPU)
    monkeypatch.setattr(load, "available_bytes", lambda device: 24)  # the near miss: exactly enough
    load_weights({"w": source("a", 2, 3), "tied": source("a", 2, 3)}, numbers, device=CPU)


def test_bytes_of_a_recipe() -> None:
    recipe = Cast(Concat((source("a", 2, 3), source("b", 2, 3)), 0), torch.bfloat16)
    assert weight_bytes(recipe) == 24
