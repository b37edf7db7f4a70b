"""The status page: a static page, and the figures that it asks for every second."""

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from autodeploy.server.metrics import ServingMetrics
from autodeploy.server.served import ServedModel

PAGE = Path(__file__).parent / "status_page.html"
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
}


def figures(served: ServedModel, metrics: ServingMetrics, version: str) -> dict[str, Any]:
    """What the page shows. Rates are differences of the counters, which the page takes itself."""
    stats = served.engine.stats()
    queried = stats.prefix_cache_queried_tokens
    return {
        "models": list(served.names),
        "version": version,
        "uptime_seconds": time.monotonic() - metrics.started,
        "is_healthy": served.engine.is_healthy,
        "is_draining": served.lifecycle.is_draining,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "state_usage_fraction": stats.state_usage_fraction,
        "preemptions": stats.num_preemptions,
        "steps": stats.num_steps,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "prefix_hit_fraction": stats.prefix_cache_hit_tokens / queried if queried else None,
        "host_seconds_per_step": stats.last_step_host_seconds,
        "model_seconds_per_step": stats.last_step_model_seconds,
        "latency_seconds": {
            "first token": percentiles(metrics.recent_first_token),
            "between tokens": percentiles(metrics.recent_between_tokens),
            "whole request": percentiles(metrics.recent_total),
        },
    }


def percentiles(values: Collection[float]) -> dict[str, float] | None:
    """The 50th, 95th and 99th; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
