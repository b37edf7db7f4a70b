"""Suites of others: their results are judged as they should be, and a suite that cannot run says why."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[str], Any]


def test_tasks_hold_real_endings_among_others(script: Script, tmp_path: Path) -> None:
    lm_eval = script("suites.lm_eval")
    lm_eval.write_tasks(tmp_path, 5)
    known = set(lm_eval.paragraphs())
    lines = [json.loads(line) for line in (tmp_path / "choice.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        assert f"{line['begin']} {line['endings'][line['answer']]}" in known
        assert len(set(line["endings"])) == 4
    assert len((tmp_path / "continuation.jsonl").read_text().splitlines()) == 5


LIKELY: list[Any] = [[["-1.5", "True"], ["-2.25", "False"]]]


@pytest.mark.parametrize(
    ("answers", "score", "agrees"),
    [
        (LIKELY, 0.5, True),
        ([[["-1.5001", "True"], ["-2.25", "False"]]], 0.50001, True),
        ([[["-1.5", "True"], ["-2.35", "False"]]], 0.5, False),
        ([[["-1.5", "False"], ["-2.25", "False"]]], 0.5, False),
        (LIKELY, 0.6, False),
    ],
)
def test_scores_agree_within_rounding_only(script: Script, answers: list[Any], score: float, agrees: bool) -> None:
    compare = script("suites.lm_eval").compare
    direct = {"task": {"scores": {"acc": 0.5}, "answers": LIKELY}}
    served = {"task": {"scores": {"acc": score}, "answers": answers}}
    found = compare(served, direct)["task"]
    assert found["agrees"] is agrees
    assert found["scores"] == {"acc": [score, 0.5]}


def test_greedy_texts_are_the_same_or_they_do_not_agree(script: Script) -> None:
    compare = script("suites.lm_eval").compare
    direct = {"task": {"scores": {}, "answers": [["a text"], ["12"]]}}
    assert compare(direct, direct)["task"]["agrees"]
    found = compare({"task": {"scores": {}, "answers": [["a test"], ["12"]]}}, direct)["task"]
    assert not found["agrees"] and found["unequal_answers"] == 1


def test_log_probabilities_of_whole_texts_are_compared_as_numbers(script: Script) -> None:
    lm_eval = script("suites.lm_eval")
    samples = [{"doc_id": at, "filtered_resps": [text]} for at, text in ((10, "-2.5"), (2, "-1.5"))]
    assert lm_eval.answers(lm_eval.WHOLE_TEXTS, samples) == [[-1.5], [-2.5]]
    assert lm_eval.answers("another", samples) == [["-1.5"], ["-2.5"]]


def _answer(*choices: tuple[str, str]) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason} for text, reason in choices]}


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, _answer(("7", "stop"), ("[7", "length")), "valid"),
        (200, _answer(("[7", "length")), "unfinished"),
        (200, _answer(("7", "stop"), ("8", "stop")), "invalid"),
        (200, _answer(("7 7", "stop")), "invalid"),
        (400, {"error": {"message": "a reason of more than a few words", "param": "response_format"}}, "refused"),
        (400, {"error": {"message": "a reason of more than a few words", "param": None}}, "failed"),
        (400, {"error": {"message": "no", "param": "response_format"}}, "failed"),
        (500, {"error": {"message": "broken"}}, "failed"),
    ],
)
def test_answers_to_schemas_are_judged(script: Script, status: int, body: Any, kind: str) -> None:
    client = script("suites.schema_client")
    assert client.judged(status, body, lambda value: None if value == 7 else "not seven")[0] == kind


def test_one_broken_answer_fails_the_schemas(script: Script) -> None:
    summary = script("suites.schemas").summary
    lines = [{"kind": kind, "why": f"cannot: {kind}"} for kind in ("valid", "valid", "refused", "no schema")]
    found = summary(lines)
    assert found["passed"] and found["schemas"] == 3 and found["served_fraction"] == 0.667
    assert found["reasons_of_refusals"] == {"refused": 1}
    assert not summary([*lines, {"kind": "invalid", "why": ""}])["passed"]
    assert not summary([*lines, {"kind": "failed", "why": ""}])["passed"]


def test_a_suite_fails_in_its_own_words(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = script("suites.setting")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    here = setting.Setting(
        url="", model="m", checkpoint=tmp_path, python=Path(sys.executable).absolute(), scratch=tmp_path
    )
    code = "import os, sys; print(os.environ.get('PYTHONPATH'), os.environ['HF_HUB_OFFLINE'], sys.argv[1:])"
    program = Path(sys.executable).name
    assert here.run([program, "-c", code], {"--a": 1, "--b": None}) == "None 1 ['--a', '1', '--b']\n"
    with pytest.raises(setting.SuiteError, match=r"(?s)ended with status 1: .*ZeroDivisionError"):
        here.run([program, "-c", "1 / 0"])
    assert len(here.commands) == 2


def test_a_suite_without_an_environment_is_not_passed(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environments = script("peers.environments")

    def refuse(*_: Any) -> Path:
        raise environments.NotAvailable("no such wheel")

    monkeypatch.setattr(environments, "python", refuse)
    suites = script("suites")
    assert suites.main(["aiperf", "--build", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    (path,) = (tmp_path / "out").glob("suite-aiperf_*.json")
    record = json.loads(path.read_text())
    assert record["passed"] is False and record["error"] == "no such wheel"
    assert "NOT PASSED" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        suites.main(["nothing"])


def test_records_name_no_place_of_a_machine(script: Script, tmp_path: Path) -> None:
    result = {"command": f"run {tmp_path}/model --data={tmp_path}/model/x", "raw": [{"id": str(tmp_path)}]}
    found = script("suites").without_places(result, {tmp_path / "model": "CHECKPOINT", tmp_path: "SCRATCH"})
    assert found == {"command": "run CHECKPOINT --data=CHECKPOINT/x", "raw": [{"id": "SCRATCH"}]}


def test_a_case_that_broke_a_rule_fails_schemathesis(script: Script) -> None:
    summary = script("suites.openapi").summary
    rates = {"POST /x": {"coverage": {"accepted": 2, "rejected": 5}, "fuzzing": {"accepted": 1, "rejected": 4}}}
    cases = {"generated": 12, "with_failures": 0, "errored": 0}
    report = {
        "complete": True,
        "test_cases": cases,
        "failures": [],
        "errors": [],
        "operations": {},
        "valid_rates": rates,
    }
    found = summary(report)
    assert found["passed"] and found["served"] == {"POST /x": {"accepted": 3, "rejected": 9}}
    for broken in (
        {"complete": False},
        {"test_cases": cases | {"with_failures": 1}},
        {"test_cases": cases | {"generated": 0}},
        {"errors": [{"title": "no document"}]},
    ):
        assert not summary(report | broken)["passed"]
