"""The page opens in a browser without a network and without an error, and shows what the build did."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from autodeploy.bench.machine import MachineLimits
from autodeploy.debug.costs import Step
from autodeploy.debug.inspect import Inspection, inspect_model
from autodeploy.debug.page import least_seconds, num_bytes, render, seconds, si, write_page
from tests import tiny

LIMITS = MachineLimits(
    device="cpu", dtype="float32", threads=1, memory_gb_per_second=2.0, matmul_gflop_per_second=50.0, matmul_size=0
)
SECTIONS = ("figures", "layers", "transforms", "time", "memory", "kernels", "graphs")


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """Two kinds of layers: with a window and without."""
    return inspect_model(tiny.TINY["gemma3_text"]())


def _in_chromium(page: Path, script: str) -> str:
    """The document after `script` ran in it; console messages are written to the document by the script's frame."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not browser:
        pytest.skip("no chromium here: the page is not opened in a browser; .ci/run installs one")
    html = page.read_text(encoding="utf-8")
    watch = (
        "<script>window.faults = []; addEventListener('error', (e) => faults.push(String(e.message)));"
        "console.error = (...all) => faults.push(all.join(' '));</script>"
    )
    after = f"<script>{script}; document.body.dataset.faults = JSON.stringify(faults);</script>"
    page.write_text(html.replace("<head>", "<head>" + watch).replace("</body>", after + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    command = [browser, *flags, *offline, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_opens_without_an_error_and_unfolds_a_diff(inspection: Inspection, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(inspection, LIMITS, page)
    script = """
      const fold = document.querySelector('details[data-name=fuse_qkv]');
      const shown = () => fold.querySelector('.add').checkVisibility({contentVisibilityProperty: true});
      const seen = {before: shown()};
      fold.querySelector('summary').click();
      seen.after = shown();
      seen.decode = Number(document.getElementById('step-total').dataset.seconds);
      const form = document.getElementById('step');
      form.elements.phase.value = 'prefill';
      form.dispatchEvent(new Event('input'));
      seen.prefill = Number(document.getElementById('step-total').dataset.seconds);
      seen.rows = document.querySelectorAll('#parts tbody tr').length;
      document.body.dataset.seen = JSON.stringify(seen)
    """
    dom = _in_chromium(page, script)
    seen, faults = (_data(dom, name) for name in ("seen", "faults"))
    assert faults == []
    assert (seen["before"], seen["after"]) == (False, True), "a click unfolds the diff"
    assert seen["decode"] == pytest.approx(least_seconds(inspection, Step.decode(1, 1024), LIMITS), rel=1e-6)
    assert seen["prefill"] == pytest.approx(least_seconds(inspection, Step.prefill(1024), LIMITS), rel=1e-6)
    assert seen["rows"] > 4


def _data(dom: str, name: str) -> dict[str, object]:
    match = re.search(rf'data-{name}="([^"]*)"', dom)
    assert match, dom[-2000:]
    value: dict[str, object] = json.loads(match[1].replace("&quot;", '"'))
    return value


def test_holds_every_part_and_nothing_from_elsewhere(inspection: Inspection) -> None:
    html = render(inspection, LIMITS)
    for section in SECTIONS:
        assert f'<section id="{section}"' in html
    for change in inspection.changes[1:]:
        assert f'data-name="{change.name}"' in html
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html) and "@import" not in html
    assert "sliding_window 12" in html, "kinds of layers are told apart by their facts"


def test_kinds_of_layers_are_those_of_the_config(inspection: Inspection) -> None:
    assert [kind.layers for kind in inspection.kinds] == [("model.layers.0", "model.layers.1"), ("model.layers.2",)]
    assert inspection.kinds[0].example == "model.layers.1"
    assert not [line for line in inspection.levels["LOWERED"] if "layers_0" in line], "one layer of a kind is shown"


def test_a_name_from_outside_cannot_become_markup(inspection: Inspection) -> None:
    inspection.report.facts["model"] = "<script>alert(1)</script>"
    try:
        assert "<script>alert" not in render(inspection, LIMITS)
    finally:
        inspection.report.facts["model"] = "model"


def test_figures_of_a_model_at_real_size() -> None:
    """Llama 3.1 8B by its published numbers, on the meta device."""
    from autodeploy.models.instantiate import instantiate

    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072)
    inspection = inspect_model(instantiate(config, dtype=torch.bfloat16))
    parameters = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096
    assert sum(numel for numel, _ in inspection.parameters.values()) == parameters == 8_030_261_248
    products = parameters - 128256 * 4096 - 65 * 4096
    flops = sum(call.cost.flops_per_token + call.cost.flops_per_row for call in inspection.calls)
    assert 2 * products <= flops <= 2.01 * products
    assert sum(call.cost.flops_per_key for call in inspection.calls) == 32 * 4 * 4096
    assert sum(call.cost.state_bytes_per_key for call in inspection.calls) == 32 * 2 * 8 * 128 * 2
    assert len(inspection.kinds) == 1 and len(inspection.kinds[0].layers) == 32
    assert len(render(inspection, LIMITS)) < 300_000


def test_units() -> None:
    assert [si(0), si(1234), si(8.03e9)] == ["0", "1.23 K", "8.03 G"]
    assert [num_bytes(0), num_bytes(512), num_bytes(128 * 1024), num_bytes(15 * 2**30)] == [
        "0 B",
        "512 B",
        "128 KiB",
        "15 GiB",
    ]
    assert [seconds(2), seconds(0.0015), seconds(3e-6), seconds(4e-9)] == ["2 s", "1.5 ms", "3 µs", "4 ns"]
