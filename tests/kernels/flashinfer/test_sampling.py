"""FlashInfer's sampling is not taken; where FlashInfer is named, the report says so with the reason."""

import pytest

from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.kernels import provider
from autodeploy.kernels.flashinfer import NOT_TAKEN, PROVIDER
from autodeploy.ops import OPS
from tests import tiny
from tests.kernels.flashinfer.fake import Recorded


@pytest.mark.parametrize("is_named", [True, False])
def test_the_report_says_why_tokens_are_chosen_by_another_kernel(
    is_named: bool, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(provider.NAMED, "cpu", (PROVIDER,))
    options = {"device": "cpu", "attn_backend": PROVIDER if is_named else "auto", "check_isolation": False}
    report = build(tiny.llama(), parse_options(options)).report
    assert report.kernels["choose_tokens"] == {"cpu": 1}
    reasons = report.kernel_reasons.get("choose_tokens", [])
    assert reasons == ([f"flashinfer: {NOT_TAKEN['choose_tokens']}"] if is_named else [])
    assert "a seed would give other tokens" in NOT_TAKEN["choose_tokens"]


def test_what_is_not_taken_has_no_kernel(recorded: Recorded) -> None:
    provider.flashinfer.load()
    assert all(PROVIDER not in OPS[name].kernels for name in NOT_TAKEN)
    assert PROVIDER in OPS["rms_norm"].kernels
