"""The page about performance says what records say, and takes none of a busy machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

Script = Callable[[str], Any]

MACHINE = {"cpu": "a processor", "threads": 2}
BUSY = [{"busy_share": 0.0}, {"busy_share": 0.3}]
FACTS = {
    "step_weight_bytes": 100_000_000,
    "state_bytes_per_token": 10_000,
    "state_bytes_per_sequence": 80_000,
    "flops_per_token": 2_000_000,
    "flops_per_logits_row": 1_024_000,
}
RECORD: dict[str, Any] = {
    "model": "small",
    "load": {"decode": [128, 128], "num_requests": 8, "prompts": [32, 512], "outputs": [64, 128]},
    "limits": [
        {"memory_gb_per_second": each, "matmul_gflop_per_second": 40.0, "busy_share": 0.04}
        for each in (20.0, 90.0, 10.0)
    ],
    "precisions": {
        "bf16": {
            "samples": {
                "AutoDeploy": {
                    "decode": [90.0, 100.0, 110.0],
                    "prefill_1024": [5000.0],
                    "start_seconds": [2.0, 1.0, 4.0],
                    "requests": [1500.0],
                },
                "one": {"decode": [50.0, 60.0, 55.0], "prefill_1024": [6250.0], "start_seconds": [1.0]},
                "two": {"decode": [80.0], "one_peak_bytes": [3e8]},
            },
            "failed": {"two": "prefill_1024: out of words"},
            "facts": {"AutoDeploy": FACTS, "one": None, "two": None},
            "agreement": {"AutoDeploy": 128.0, "one": 127.6},
        },
        "int4": {"samples": {"one": {"decode": [70.0]}}, "failed": {}, "facts": {}},
    },
    "not_available": {"AutoDeploy int4": "raises"},
    "machine": MACHINE,
    "versions": {"torch": "2.13"},
    "environments": {"llamacpp": {"note": "built here"}},
}


def _write(folder: Path, name: str, **changes: Any) -> None:
    (folder / name).write_text(json.dumps(RECORD | changes))


def test_the_newest_record_of_an_idle_machine_counts(script: Script, tmp_path: Path) -> None:
    newest = script("peers.summary").newest
    _write(tmp_path, "peers-small_arm_20260102-1200.json", versions={"torch": "new"})
    _write(tmp_path, "peers-small_x86_20260101-1200.json", versions={"torch": "old"})
    only = {"int4": RECORD["precisions"]["int4"]}
    _write(tmp_path, "peers-small_x86_20260102-1300.json", versions={"torch": "newest"}, precisions=only)
    _write(tmp_path, "peers-small_x86_20260103-1200.json", limits=BUSY)
    records, busy = newest(tmp_path, "peers")
    versions = {precision: record["versions"] for precision, record in records["small"].items()}
    assert versions == {"bf16": {"torch": "new"}, "int4": {"torch": "newest"}}
    assert busy == ["peers-small_x86_20260103-1200.json"]


def test_ratios_and_shares_follow_from_medians(script: Script) -> None:
    summary = script("peers.summary")
    group = RECORD["precisions"]["bf16"]
    decode = summary.samples(group, "decode")
    assert summary.advantage(decode, "decode") == pytest.approx(100 / 80)
    assert summary.advantage(summary.samples(group, "start_seconds"), "start_seconds") == pytest.approx(1 / 2)
    assert summary.advantage({"AutoDeploy": [1.0]}, "decode") is None
    step = 100e6 + 10e3 * (128 + 64) + 80e3
    assert summary.share(RECORD, group, "decode") == pytest.approx(100 * step / 20e9)
    assert summary.share(RECORD, group, "prefill_1024") == pytest.approx(5000 * (2e6 + 1e3) / 40e9)
    of_token = 2e6 * (272 + 96) / 96 + 1.024e6
    assert summary.share(RECORD, group, "requests") == pytest.approx(1500 * of_token / 40e9)
    assert summary.share(RECORD, group, "start_seconds") is None
    assert summary.share(RECORD, RECORD["precisions"]["int4"], "decode") is None


def test_the_page_and_its_plot(script: Script, tmp_path: Path) -> None:
    _write(tmp_path, "peers-small_x86_20260101-1200.json")
    ratios = {"int8": {"ratios": {"fuse_qkv": {"decode": 1.25, "prefill": 1.0}}}}
    _write(tmp_path, "ablation-small-int8_x86_20260101-1200.json", precisions=ratios)
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    script("performance_page").main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| bf16 | AutoDeploy | **100** [90-110] 1.25x 51% | **5,000** 0.80x 25% |" in text
    assert "| bf16 | two | 80 | - |" in text
    assert "- Not measured: AutoDeploy int4: raises." in text
    assert "- Failed: two bf16: prefill_1024: out of words." in text
    assert "### small, int8" in text
    assert "| fuse_qkv | 1.25 | 1.00 |" in text
    drawn = ElementTree.parse(page.parent / "images" / "peers-small.svg").getroot()
    texts = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("AutoDeploy bf16") == len(script("performance_page").PLOTTED)
    assert texts.count("one int4") == 1
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert len(bars) == 4 + 2 + 1
    widths = [float(each.attrib["width"]) for each in bars[:4]]
    assert widths == pytest.approx([100 / 110 * 210, 55 / 110 * 210, 80 / 110 * 210, 70 / 110 * 210], abs=0.1)


def _times(first: float, last: float, name: str) -> dict[str, list[float]]:
    return {f"{name}_p50_seconds": [first], f"{name}_p99_seconds": [last]}


def test_servers_have_a_section(script: Script, tmp_path: Path) -> None:
    rates = {"clients_4_requests_per_second": [2.0, 3.0, 4.0], "clients_4_tokens_per_second": [120.0]}
    ours = rates | _times(0.05, 0.25, "clients_4_first_token") | _times(0.01, 0.02, "clients_4_between_tokens")
    ours |= _times(0.5, 0.6, "prefix_apart_first_token") | _times(0.04, 0.05, "prefix_shared_first_token")
    ours |= {"repetitive_tokens_per_second": [60.0], "guided_8_overhead": [0.031]}
    drafts = {"repetitive_tokens_per_second": [90.0]}
    groups = {
        "bf16": {
            "samples": {"AutoDeploy": ours, "AutoDeploy with drafts": drafts, "two": rates},
            "failed": {"three": "start: no"},
        }
    }
    load = {"levels": [4], "guided_clients": [8], "shared_prefix": 1024}
    _write(tmp_path, "servers-small_x86_20260101-1200.json", precisions=groups, load=load)
    _write(tmp_path, "servers-small_x86_20260102-1200.json", limits=BUSY)
    page = tmp_path / "page.md"
    script("performance_page").main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| 4 | **AutoDeploy** | 3 | 120 | 50 / 250 | 10 / 20 |" in text
    assert "| 4 | two | 3 | 120 | - / - | - / - |" in text
    assert "| **AutoDeploy** | 500 / 600 | 40 / 50 | 60 | +3.1% per token |" in text
    assert "| **AutoDeploy with drafts** | - / - | - / - | 90 | - |" in text
    assert "| 4 | **AutoDeploy with drafts**" not in text
    assert "- Failed: three bf16: start: no." in text
    assert "Left out, as the machine was busy: `servers-small_x86_20260102-1200.json`." in text
    drawn = ElementTree.parse(tmp_path / "images" / "servers-small.svg").getroot()
    texts = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "requests/s, 4 clients" and "AutoDeploy bf16" in texts and "two bf16" in texts


def test_without_records_the_page_says_so(script: Script, tmp_path: Path) -> None:
    _write(tmp_path, "peers-small_x86_20260101-1200.json", limits=BUSY)
    script("performance_page").main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "No record of a run on an idle machine" in text
    assert "Left out, as the machine was busy: `peers-small_x86_20260101-1200.json`." in text
