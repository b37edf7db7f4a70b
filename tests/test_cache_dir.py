import multiprocessing
from pathlib import Path

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


def _write(folder: Path, text: str) -> None:
    (folder / "content").write_text(text)


def _fill(path: Path) -> str:
    cache_dir.fill(path, lambda folder: _write(folder, "whole"))
    return (path / "content").read_text()
