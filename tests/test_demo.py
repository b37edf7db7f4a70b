"""The demo, on a tiny model: it answers, reports, agrees with transformers, and fails in one line."""

from pathlib import Path

import pytest

from autodeploy import demo
from autodeploy.bench.reference import Timing
from tests import tiny


def test_it_answers_reports_and_agrees_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    assert demo.main([str(folder), "--max-tokens", "6", "--runs", "1"]) == 0
    printed = capsys.readouterr().out
    assert demo.QUESTION in printed
    for word in ("match_attention", "cached_attention", "tokens per second", "time to first token"):
        assert word in printed
    # float32, greedy: every token is the same.
    (agreement,) = [line for line in printed.splitlines() if "tokens equal" in line]
    assert [cell.strip() for cell in agreement.split("│")][2:4] == ["6", "of 6"]


def test_without_a_chat_template_it_continues_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert demo.main([str(folder), "--max-tokens", "2", "--runs", "0"]) == 0
    printed = capsys.readouterr().out
    assert demo.COMPLETION in printed
    assert "tokens per second" not in printed


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nothing" in error
    assert "Traceback" not in error


def test_the_table_compares_medians() -> None:
    def timing(rate: float, first: float) -> Timing:
        return Timing(token_ids=[1, 2, 3], first_token_seconds=first, decode_seconds=2 / rate)

    ours = [timing(10, 0.1), timing(40, 0.2), timing(90, 0.9)]
    theirs = [timing(20, 0.4), timing(20, 0.4), timing(1, 9.0)]
    columns = [list(column.cells) for column in demo.comparison_table(ours, theirs).columns]
    assert columns[1] == ["40.0", "200 ms", "3"]
    assert columns[2] == ["20.0", "400 ms", "of 3"]
    assert columns[3] == ["2.00x", "2.00x", ""]


@pytest.mark.parametrize(
    ("ours", "theirs", "same"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2], 2), ([2, 1], [1, 1], 0)]
)
def test_the_table_counts_equal_tokens_from_the_start(ours: list[int], theirs: list[int], same: int) -> None:
    sides = [[Timing(token_ids=ids, first_token_seconds=1.0, decode_seconds=1.0)] for ids in (ours, theirs)]
    assert list(demo.comparison_table(*sides).columns[1].cells)[2] == str(same)
