"""A checkpoint that brings its own code is checked, built and served when that is asked for, and refused otherwise."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from autodeploy import LLM, SamplingParams
from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.debug.check import check
from autodeploy.debug.check_report import INCONCLUSIVE, PASSED
from autodeploy.debug.full_check import full_check
from autodeploy.debug.original import original_of
from autodeploy.debug.packed_run import run_packed
from autodeploy.errors import UnsupportedModelError
from tests import remote_code

TRUSTED = parse_options({"trust_remote_code": True})
ROWS = [torch.tensor([5, 80, 3, 7]), torch.tensor([9, 9])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return remote_code.save(tmp_path_factory.mktemp("remote") / "paper")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("use", [build, check, full_check, LLM], ids=lambda use: use.__name__)
def test_is_refused_unless_trusted(folder: Path, use: Callable[[str], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"it brings its own code: read that, and pass trust_remote_code"):
        use(str(folder))


def test_build_gives_the_logits_of_its_code(folder: Path, reference: Any) -> None:
    program = build(str(folder), TRUSTED)
    assert {"roll_loops", "match_attention"} <= program.report.rewrites().keys()
    with torch.no_grad():
        expected = torch.cat([reference(row[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(run_packed(program, ROWS), expected, rtol=1e-4, atol=1e-4)


def test_llm_serves_it(folder: Path, reference: Any) -> None:
    tokens = [5, 80, 3]
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM(str(folder), trust_remote_code=True) as llm:
        assert llm.generate([[5, 80, 3]], params, use_tqdm=False)[0].outputs[0].token_ids == tokens[3:]


def test_check_compares_it_on_a_tiny_clone(folder: Path) -> None:
    report = check(str(folder), parse_options({"trust_remote_code": True, "dtype": "bfloat16"}))
    assert report.passed, report.culprit
    assert {row.name for row in report.rows if row.verdict != PASSED} == {"capture"}, "its loop over tokens"
    assert report.rows[0].verdict == INCONCLUSIVE and "once it is rolled" in report.rows[0].note
    assert report.rows[-1].against_original is not None


def test_a_module_of_its_code_can_be_checked(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodeploy.debug.clone.SMALL_NUMEL", 10)  # as if it were large: it is shrunken
    assert check(reference).passed


def test_a_full_check_loads_it_in_transformers(folder: Path) -> None:
    report = full_check(str(folder), TRUSTED, prompts=["hello"], max_tokens=4, perplexity=("text", "hello there"))
    assert report.passed and report.prompts[0].ours.num_equal_tokens == 4


@pytest.mark.slow
def test_on_the_command_line_in_a_process_that_has_not_seen_it(folder: Path) -> None:
    code = "import sys; from autodeploy.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    arguments = [sys.executable, "-c", code, "check", str(folder), "--trust-remote-code"]
    done = subprocess.run(arguments, env=paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "roll_loops" in done.stdout and "PaperForCausalLM" in done.stdout


def test_a_hub_model_of_a_revision_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        assert "*.py" in allow_patterns
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = parse_options({"trust_remote_code": True, "revision": "v2"})
    assert check("owner/paper", options).facts["model"] == "owner/paper"
    original = original_of("owner/paper", options.model)
    with original.loaded(torch.float32, torch.device("cpu")) as module:
        assert type(module).__name__ == "PaperForCausalLM"
    assert asked == [("owner/paper", "v2")] * 2
