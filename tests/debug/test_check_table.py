"""The table fits a terminal of 80 columns whole, and says what to know about each line that is not green."""

import io

from rich.console import Console

from autodeploy.debug.check_report import FAILED, INCONCLUSIVE, CheckReport, CheckRow
from autodeploy.debug.check_table import print_check
from autodeploy.debug.compare import Difference
from autodeploy.graph.report import TransformReport


def _printed(report: CheckReport) -> str:
    stream = io.StringIO()
    print_check(report, Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


def _row(name: str, **changes: object) -> CheckRow:
    transform = TransformReport(
        name=name, stage="fuse", found=10, rewritten=9, expected=10, refused=("[a] widths differ",)
    )
    return CheckRow(stage="fuse", name=name, transform=transform, error=1.5e-6, tolerance=2e-5, **changes)  # type: ignore[arg-type]


def test_a_line_is_whole_on_eighty_columns() -> None:
    text = _printed(CheckReport([_row("fuse_add_rms_norm", verdict=INCONCLUSIVE)], {"model": "m", "dtype": "float32"}))
    (line,) = [line for line in text.splitlines() if line.startswith("  fuse_add_rms_norm")]
    assert line.split() == ["fuse_add_rms_norm", "10", "10", "9", "1", "2e-06", "2e-05", INCONCLUSIVE]
    assert "fuse_add_rms_norm refused: [a] widths differ" in text and "model m, dtype float32" in text


def test_the_first_failure_is_the_last_word() -> None:
    text = _printed(
        CheckReport([_row("one"), _row("two", verdict=FAILED, note="at here"), _row("three", verdict=FAILED)])
    )
    assert "two: at here" in text
    assert text.rstrip().endswith("FAILED: two (stage fuse) is the first to go wrong")


def test_a_pass_says_how_near_the_original_it_is() -> None:
    near = Difference(relative_error=1e-6, kl_divergence=2e-9, top_1_agreement=0.99)
    words = " ".join(_printed(CheckReport([_row("one", against_original=near)])).split())
    assert "off by 1.0e-06 of the largest, KL divergence 2.0e-09 nats, top-1 agreement 99.0%" in words
    assert "nothing was compared" in _printed(CheckReport())
