"""The status page in a browser: it opens without an error, shows the server's figures, and asks for a key."""

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from autodeploy.runtime.stats import EngineStats
from autodeploy.server.status import percentiles
from tests.runtime.fake_engine import FakeEngine
from tests.server.running import Start


def dom(url: str, folder: Path) -> str:
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not browser:
        pytest.skip("no chromium here: the page is not opened in a browser; .ci/run installs one")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=3000"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}"]
    command = [browser, *flags, *offline, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_shows_the_servers_figures(start: Start, tmp_path: Path) -> None:
    server = start()
    for _ in range(3):
        server.post("/v1/completions", {"prompt": "x", "max_tokens": 5})
    page = html.unescape(dom(f"{server.url}/status", tmp_path))
    assert "tiny, alias" in page and "AutoDeploy 1.2.3" in page
    assert re.search(r'data-name="generated tokens"><dt>generated tokens</dt><dd>15</dd>', page)
    assert re.search(r'data-name="state memory in use"><dt>[^<]*</dt><dd>25.0 %</dd>', page)
    assert re.search(r"<th>first token</th><td>[0-9.]+ m?s</td>", page)
    assert re.search(r'<div id="note" role="status"></div>', page), "nothing to complain of"


class BusyEngine(FakeEngine):
    """Tells of a batch, a queue and a cache."""

    def stats(self) -> EngineStats:
        told: Any = {"num_running": 2, "num_waiting": 5, "prefix_cache_queried_tokens": 4, "prefix_cache_hit_tokens": 1}
        return replace(super().stats(), **told)


def test_shows_batch_queue_cache_rate_and_percentiles(start: Start, tmp_path: Path) -> None:
    server = start(BusyEngine(step_seconds=0.0005))
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 5})
    body = {"prompt": "x", "max_tokens": 10**6, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60):
        page = html.unescape(dom(f"{server.url}/status", tmp_path))
    shown = dict(re.findall(r'data-name="([^"]*)"><dt>[^<]*</dt><dd>([^<]*)</dd>', page))
    assert (shown["running"], shown["waiting"], shown["prefix cache hits"]) == ("2", "5", "25.0 %")
    assert float(shown["generated tokens/s"]) > 0
    for name in ("first token", "between tokens", "whole request"):
        assert re.search(rf"<th>{name}</th>(<td>[0-9.]+ m?s</td>){{3}}</tr>", page), name


def test_asks_for_a_key(start: Start, tmp_path: Path) -> None:
    page = dom(f"{start(api_key=('k',)).url}/status", tmp_path)
    assert "this server needs a key" in page and re.search(r'id="ask" style="display: block;?"', page)


def test_nothing_comes_from_elsewhere(start: Start) -> None:
    response = httpx.get(f"{start().url}/status")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["'](https?:)?//""", response.text)
    assert "innerHTML" not in response.text, "names from outside cannot become markup"


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles(range(1, 101)) == {"p50": 51, "p95": 96, "p99": 100}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
