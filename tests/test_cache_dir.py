import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodeploy import cache_dir, env
from autodeploy.errors import ConfigError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
keys = st.dictionaries(st.text(), json_values, max_size=4)


def test_the_root_is_the_environments_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    assert cache_dir.entry("graph", {"a": 1}).parent == tmp_path / "graph"
    monkeypatch.delenv("AUTODEPLOY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert env.cache_root() == tmp_path / "home" / ".cache" / "autodeploy"


@given(keys, keys)
def test_entries_are_equal_exactly_when_keys_are(one: dict[str, object], other: dict[str, object]) -> None:
    reordered = dict(reversed(one.items()))
    assert cache_dir.entry("x", one) == cache_dir.entry("x", reordered)
    same = repr(sorted(one.items())) == repr(sorted(other.items()))  # repr: 1 and True are not the same key
    if not same and one != other:
        assert cache_dir.entry("x", one) != cache_dir.entry("x", other)
    assert cache_dir.entry("x", one) != cache_dir.entry("y", one)


def test_a_key_must_be_plain_data() -> None:
    with pytest.raises(TypeError):
        cache_dir.entry("x", {"path": Path("/")})


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "kind" / "entry"
    assert cache_dir.fill(path, lambda folder: _write(folder, "first")) == path
    cache_dir.fill(path, lambda folder: _write(folder, "second"))
    assert (path / "content").read_text() == "first"


def test_an_entry_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder, "half")
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        cache_dir.fill(tmp_path / "entry", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    path = tmp_path / "entry"

    def overtaken(folder: Path) -> None:
        _write(folder, "slow")
        cache_dir.fill(path, lambda other: _write(other, "fast"))

    cache_dir.fill(path, overtaken)
    assert (path / "content").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [path]


def test_many_processes_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_fill, [path] * 3) == ["whole"] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_root_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="AUTODEPLOY_CACHE"):
        cache_dir.fill(tmp_path / "file" / "kind" / "entry", lambda folder: None)


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_the_system(folder: Path) -> None:
        _write(folder, "half")
        with open("/dev/full", "w", encoding="utf-8") as disk:
            disk.write("rest")

    def by_a_library(folder: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    for write in (by_the_system, by_a_library):
        with pytest.raises(ConfigError, match=r"is full.*AUTODEPLOY_CACHE"):
            cache_dir.fill(tmp_path / "entry", write)

    def without_a_word(folder: Path) -> None:
        raise RuntimeError("the linker was killed")

    with pytest.raises(RuntimeError, match="linker"):
        cache_dir.fill(tmp_path / "entry", without_a_word)
    monkeypatch.setattr(cache_dir, "LEAST_FREE_BYTES", 2**62)
    with pytest.raises(ConfigError, match="is full"):
        cache_dir.fill(tmp_path / "entry", without_a_word)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_fills_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writing = [context.Event() for _ in range(2)]
    processes = [
        context.Process(target=_fill_for_ever, args=(tmp_path / name, is_writing), daemon=True)
        for name, is_writing in zip(("killed", "running"), writing, strict=True)
    ]
    for process, is_writing in zip(processes, writing, strict=True):
        process.start()
        assert is_writing.wait(60)
    processes[0].kill()
    processes[0].join(60)
    (left,) = tmp_path.glob(".killed-*")
    (running,) = tmp_path.glob(".running-*")
    cache_dir.fill(tmp_path / "other", lambda folder: _write(folder, "whole"))
    assert not left.exists() and (running / "content").read_text() == "half"
    processes[1].kill()
    processes[1].join(60)
    cache_dir.fill(tmp_path / "killed", lambda folder: _write(folder, "whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"other", "killed"}


def _fill_for_ever(path: Path, is_writing: Any) -> None:
    def write(folder: Path) -> None:
        _write(folder, "half")
        is_writing.set()
        time.sleep(600)

    cache_dir.fill(path, write)


def _write(folder: Path, text: str) -> None:
    (folder / "content").write_text(text)


def _fill(path: Path) -> str:
    cache_dir.fill(path, lambda folder: _write(folder, "whole"))
    return (path / "content").read_text()
