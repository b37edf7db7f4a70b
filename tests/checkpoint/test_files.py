import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autodeploy.checkpoint import files
from autodeploy.checkpoint.files import SAFETENSORS_DTYPES, find_weight_files, open_weight_file
from autodeploy.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pt", "old.bin"])
def test_names_shapes_and_values(tmp_path: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        save_file(TENSORS, tmp_path / name)
    else:
        torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=name != "old.bin")
    file = open_weight_file(tmp_path / name)
    assert set(file.tensors) == set(TENSORS)
    for tensor_name, want in TENSORS.items():
        header = file.tensors[tensor_name]
        assert (header.is_meta, header.shape, header.dtype) == (True, want.shape, want.dtype)
        got = file.read(tensor_name)
        file.close()  # what was handed out stays valid
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_every_dtype_of_safetensors_is_known(tmp_path: Path) -> None:
    dtypes = set(SAFETENSORS_DTYPES.values())
    save_file({str(dtype): torch.zeros(2).to(dtype) for dtype in dtypes}, tmp_path / "all.safetensors")
    file = open_weight_file(tmp_path / "all.safetensors")
    assert {name: str(tensor.dtype) for name, tensor in file.tensors.items()} == {str(d): str(d) for d in dtypes}


def test_safetensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"big": torch.ones(64, 2**20 // 4), "small": torch.ones(4)}, path)
    before = _private_bytes()
    big = open_weight_file(path).read("big")
    assert big[-1, -1] == 1
    assert _private_bytes() - before < 32 * 2**20, "64 MiB were copied into memory"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells mapped memory from /proc")
def test_memory_of_what_was_read_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_MAPPED_BYTES", 2**20)
    path = tmp_path / "model.safetensors"
    save_file({f"part{index}": torch.full((2**18,), float(index)) for index in range(8)}, path)  # a megabyte each
    file = open_weight_file(path)
    parts, most = [], 0
    for index in range(8):
        parts.append(file.read(f"part{index}"))
        assert (parts[-1] == index).all()
        most = max(most, _mapped_bytes(path))
    assert 2**20 <= most <= 3 * 2**20
    file.close()
    assert all((part == index).all() for index, part in enumerate(parts)), "read again when needed"


def _mapped_bytes(path: Path) -> int:
    """Memory of this process that holds pages of a file."""
    held, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counts = line.endswith(str(path))
        elif line.startswith("Rss:") and counts:
            held += 1024 * int(line.split()[1])
    return held


@pytest.mark.parametrize("cut_bytes", [1, 6, 20])
def test_a_truncated_safetensors_file_names_tensor_and_file(tmp_path: Path, cut_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.ones(16), "last": torch.ones(2)}, path)
    whole = path.read_bytes()
    open_weight_file(path)
    path.write_bytes(whole[:-cut_bytes])
    cut_tensor = "first" if cut_bytes > 8 else "last"
    with pytest.raises(CheckpointError, match=rf"model.safetensors.*cut short.*{cut_tensor!r}.*again"):
        open_weight_file(path)


@pytest.mark.parametrize(
    "content", [b"", b"12345", b"version https://git-lfs.github.com/spec/v1", b"\x02" + 7 * b"\0" + b"{x"]
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_weight_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(1), "x": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused.*system.*safetensors") as caught:
        open_weight_file(path)
    assert not marker.exists()
    assert "weights_only=False" not in str(caught.value), "advice that would run the code"


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        open_weight_file(tmp_path / "model.pt")


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match=r"training\.pt holds no plain state dict"):
        open_weight_file(tmp_path / "training.pt")


def test_a_truncated_pickle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read.*again"):
        open_weight_file(path)


def test_a_missing_or_unknown_file_is_named(tmp_path: Path) -> None:
    for name in ("gone.safetensors", "gone.bin"):
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            open_weight_file(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"model\.h5 is no weight file"):
        open_weight_file(tmp_path / "model.h5")


def test_files_are_found_in_the_order_of_trust(tmp_path: Path) -> None:
    assert find_weight_files(tmp_path) == ()
    _touch(tmp_path, "weights.pt", "consolidated.pth")
    assert find_weight_files(tmp_path) == (tmp_path / "weights.pt",)
    _touch(tmp_path, "pytorch_model.bin")
    assert find_weight_files(tmp_path) == (tmp_path / "pytorch_model.bin",)
    _touch(tmp_path, "model.safetensors", "consolidated.safetensors")
    assert find_weight_files(tmp_path) == (tmp_path / "model.safetensors",)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    _touch(tmp_path, *shards)
    _write_index(tmp_path, {"a": shards[1], "b": shards[0], "c": shards[1]})
    assert find_weight_files(tmp_path) == tuple(tmp_path / shard for shard in shards)


def test_several_files_without_an_index_are_not_guessed(tmp_path: Path) -> None:
    _touch(tmp_path, "one.safetensors", "two.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors, two\.safetensors"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "missing.safetensors", 3])
def test_an_index_may_only_name_files_of_its_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _touch(tmp_path, "outside.safetensors")
    _write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match=str(name).replace("/", "[/]")):
        find_weight_files(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "{"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is no index"):
        find_weight_files(tmp_path)


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def _write_index(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
