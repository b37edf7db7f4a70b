"""Kept weights: what was quantised is read back bit for bit; changed files, damage and full disks cost no start."""

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autodeploy.checkpoint import kept
from autodeploy.checkpoint.kept import KeptWeights
from autodeploy.checkpoint.load import load_weights
from autodeploy.checkpoint.quantize import Float8Format, NumberFormat
from autodeploy.checkpoint.recipe import Quantize, Recipe, Source

CPU = torch.device("cpu")
FORMATS = (NumberFormat(8, None), NumberFormat(4, 32, has_offsets=True), Float8Format())
SOURCE = Source("matrix", (48, 64), torch.float32)
RECIPES: dict[str, Recipe] = {"plain": SOURCE} | {
    f"{number_format} {part}": Quantize(SOURCE, number_format, part)
    for number_format in FORMATS
    for part in number_format.parts
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"stands for the matrix")
    return path


def _load(checkpoint: Path, graph: str = "graph", seed: int = 0) -> tuple[dict[str, Tensor], bool, int]:
    """The loaded weights, whether kept ones were used, and how often the checkpoint was read."""
    matrix = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return matrix

    weights = KeptWeights(graph, {"folder": "a model"}, [checkpoint])
    return load_weights(RECIPES, read, device=CPU, kept=weights), weights.is_used, len(reads)


def _entries(checkpoint: Path) -> list[Path]:
    return list((checkpoint.parent / "cache" / "weights").glob("*"))


def test_quantised_weights_are_read_back_bit_for_bit(checkpoint: Path) -> None:
    first, was_used, num_reads = _load(checkpoint)
    assert not was_used and num_reads == 1 + len(FORMATS)
    again, is_used, num_reads = _load(checkpoint)
    assert is_used and num_reads == 1, "what is not quantised is not kept"
    for name, tensor in first.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), again[name].flatten().view(torch.uint8)), name


def test_weights_may_be_asked_for_in_any_order(checkpoint: Path) -> None:
    weights = KeptWeights("graph", {}, [checkpoint])
    made = {
        recipe: torch.full(recipe.shape, index + 1).to(recipe.dtype)
        for index, recipe in enumerate(recipe for recipe in RECIPES.values() if isinstance(recipe, Quantize))
    }
    weights.save(made)
    with weights.opened(list(reversed(made))) as opened:
        assert opened is not None
        for recipe, expected in made.items():
            out = torch.empty_like(expected)
            opened.read(recipe, out)
            assert torch.equal(out.float(), expected.float()), recipe


def test_a_checkpoint_that_changed_is_quantised_anew_and_has_one_entry(checkpoint: Path) -> None:
    first, _, _ = _load(checkpoint)
    status = checkpoint.stat()
    checkpoint.write_bytes(b"STANDS FOR THE MATRIX")  # as long as before, and dated back
    os.utime(checkpoint, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, was_used, _ = _load(checkpoint, seed=1)
    assert not was_used
    assert not torch.equal(first["int8 per row numbers"], second["int8 per row numbers"])
    assert len(_entries(checkpoint)) == 1, "that of the old content is gone"
    third, is_used, _ = _load(checkpoint, seed=1)
    assert is_used and all(torch.equal(third[name], tensor) for name, tensor in second.items())


def test_another_graph_has_weights_of_its_own(checkpoint: Path) -> None:
    _load(checkpoint)
    assert not _load(checkpoint, graph="another")[1]


@pytest.mark.parametrize("is_gone", [False, True], ids=["changed", "gone"])
def test_what_changes_while_it_is_read_is_not_kept(checkpoint: Path, is_gone: bool) -> None:
    weights = KeptWeights("graph", {}, [checkpoint])
    checkpoint.write_bytes(b"a third content")
    if is_gone:
        checkpoint.unlink()
    load_weights(RECIPES, lambda _: torch.zeros(48, 64), device=CPU, kept=weights)
    assert _entries(checkpoint) == []


def test_what_has_just_changed_is_not_trusted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SETTLED_SECONDS", 3600.0)
    for _ in range(2):
        assert not _load(checkpoint)[1]
    assert _entries(checkpoint) == []


@pytest.mark.parametrize("damage", ["cut", "no contents", "other contents"])
def test_a_damaged_entry_is_made_anew(checkpoint: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first, _, _ = _load(checkpoint)
    (entry,) = _entries(checkpoint)
    if damage == "cut":
        os.truncate(entry / "tensors.bin", 100)
    elif damage == "no contents":
        (entry / "contents.json").write_text("[[")
    else:
        (entry / "contents.json").write_text("[]")
    again, was_used, _ = _load(checkpoint)
    assert not was_used and "cannot be read" in caplog.text
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert _load(checkpoint)[1], "and kept again"


def test_a_disk_without_room_costs_the_entry_and_not_the_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept, "LEAST_FREE_SHARE", 2**50)
    with caplog.at_level(logging.WARNING):
        loaded, _, _ = _load(checkpoint)
    assert "are not kept" in caplog.text and _entries(checkpoint) == []
    assert loaded["plain"].isfinite().all()


def test_a_file_that_cannot_be_read_to_its_end_costs_no_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, _, _ = _load(checkpoint)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    again, _, _ = _load(checkpoint)
    assert "quantising anew" in caplog.text
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
