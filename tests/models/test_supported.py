"""What is on the list of supported architectures stays so: one of each mixture here, all of them in `make sweep`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from autodeploy.debug.shrink import shrink, tiny_model
from tests.sweep import page
from tests.sweep.architectures import ENCODER, SEQ2SEQ, config_of, names, same_architecture, why_no_decoder
from tests.sweep.reference import Greedy, generated, greedy, logits_of
from tests.sweep.runner import state_of_the_code, sweep
from tests.sweep.stages import STAGES, examine
from tests.threads import torch_threads

WITHOUT_COMPILE = tuple(stage for stage in STAGES if stage != "compile")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 64 columns gain nothing from a second thread, and on a busy machine wait for it."""
    with torch_threads(1):
        yield


def one_of_each_mixture() -> list[str]:
    """The first name on the list for every set of token mixers, with and without experts."""
    first: dict[frozenset[str], str] = {}
    for name, parts in page.pinned_list().items():
        first.setdefault(frozenset(parts), name)
    return sorted(first.values())


@pytest.mark.filterwarnings("ignore")  # transformers' own code warns, of its deprecations and of tiny sizes
@pytest.mark.parametrize("name", one_of_each_mixture())
def test_one_of_each_mixture_passes_every_stage(name: str) -> None:
    result = examine(name, WITHOUT_COMPILE)
    assert (result["status"], result["reason"]) == ("passed", "")
    assert sum(result["mixers"].values()) > 0


def test_the_page_and_the_list_say_the_same() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    supported = text.split("## Supported")[1].split("## Not supported")[0]
    listed = {row.split("|")[1].split()[0] for row in supported.splitlines() if row.startswith("| ")} - {"model"}
    assert listed == set(page.pinned_list()) <= set(names())


def test_losses_and_gains_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "pinned_list", lambda: {"gone": {}, "stays": {}, "not_asked": {}})
    results: list[dict[str, Any]] = [
        {"name": "gone", "status": "failed"},
        {"name": "stays", "status": "passed"},
        {"name": "new", "status": "passed"},
        {"name": "never", "status": "failed"},
    ]
    assert page.against_the_list(results) == (["gone"], ["new"])


def test_an_entry_with_anothers_class_is_counted_once() -> None:
    results = [
        {"name": "composite", "class": "Big", "text_config": "TextConfig", "is_composite": True},
        {"name": "text", "class": "Text", "text_config": "TextConfig", "is_composite": False},
        {"name": "again", "class": "Text", "text_config": "OtherConfig", "is_composite": False},
        {"name": "other", "class": "Other", "text_config": "ThirdConfig", "is_composite": False},
        {"name": "broken"},
        {"name": "broken too"},
    ]
    assert same_architecture(results) == {"composite": "text", "again": "text"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("bert", ENCODER),
        ("xlnet", ENCODER),
        ("xlm", ENCODER),
        ("gpt_neox", None),
        ("openai-gpt", None),
        ("cpmant", None),
    ],
)
def test_the_rules_for_what_is_no_decoder(name: str, rule: str | None) -> None:
    config = config_of(name)
    ids = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    assert why_no_decoder(tiny_model(shrink(config)), config, ids) == rule


def test_an_encoder_decoder_is_told_by_its_config() -> None:
    result = examine("bart", WITHOUT_COMPILE)
    assert (result["status"], result["reason"]) == ("no decoder", SEQ2SEQ)


def test_the_reference_is_what_transformers_generates() -> None:
    model = tiny_model(shrink(AutoConfig.for_model("gemma3_text")))
    expected = greedy(model, [5, 6, 7], 8)
    assert expected.tokens == generated(model, [5, 6, 7], 8)
    last = logits_of(model, torch.tensor([[5, 6, 7]]))[-1]
    assert expected.tokens[0] == int(last.argmax())
    assert expected.agrees(expected.tokens) == (True, False)
    assert expected.agrees(expected.tokens[:-1]) == (False, False)


def test_only_a_tie_excuses_another_token() -> None:
    reference = Greedy([1, 2, 3], [0.5, 1e-6, 0.5])
    assert reference.agrees([1, 9, 9]) == (True, True)
    assert reference.agrees([9, 2, 3]) == (False, False)
    assert reference.agrees([1, 2, 9]) == (False, False)


def test_a_failure_is_reported_with_its_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("tests.sweep.runner.RESULTS", tmp_path)
    monkeypatch.setattr("tests.sweep.stages.TOLERANCE", -1.0)
    (result,) = sweep(["llama"], WITHOUT_COMPILE, jobs=1)
    assert result["status"] == "failed" and result["reason"].startswith("logits: Mismatch: logits differ from eager")
    assert result["code"] == state_of_the_code()
    monkeypatch.setattr("tests.sweep.runner._fork", None)  # a second time it is read, not run
    assert list(sweep(["llama"], WITHOUT_COMPILE, jobs=1)) == [result]
