"""Load generators nobody here wrote: guidellm, AIPerf and `vllm bench serve`, on random prompts of one length.

What they measure is kept as they wrote it. A run passes when every request was answered with as many tokens as asked.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suites.setting import Setting

VLLM = Path(__file__).parents[1] / "peers" / "vllm_cli.py"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked: requests of so many tokens, so many at once."""

    requests: int = 64
    concurrency: int = 8
    prompt_tokens: int = 128
    output_tokens: int = 32


SMOKE = Load(requests=4, concurrency=2, prompt_tokens=16, output_tokens=4)


def guidellm(setting: Setting) -> dict[str, Any]:
    """Streamed chat conversations."""
    load = SMOKE if setting.is_smoke else Load()
    path = setting.scratch / "guidellm.json"
    data = f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}"
    flags = {
        "--backend": f"kind=openai_http,target={setting.url},model={setting.model}",
        "--profile": f"kind=concurrent,streams={load.concurrency}",
        "--constraint": f"kind=max_requests,count={load.requests}",
        "--tokenizer": f"kind=huggingface_auto,model={setting.checkpoint}",
        "--data": data,
        "--output": f"kind=json,path={path}",
    }
    setting.run(["guidellm", "run"], flags)
    raw = _read(path)
    for benchmark in raw["benchmarks"]:
        benchmark["requests"] = "left out: their texts are most of the file"
    metrics = raw["benchmarks"][0]["metrics"]
    return {
        "passed": metrics["request_totals"]["successful"] == load.requests
        and metrics["output_token_count"]["successful"]["total_sum"] == load.requests * load.output_tokens,
        "raw": raw,
    }


def aiperf(setting: Setting) -> dict[str, Any]:
    """Streamed completions."""
    load = SMOKE if setting.is_smoke else Load()
    folder = setting.scratch / "aiperf"
    flags = {
        "--model": setting.model,
        "--url": setting.url,
        "--endpoint-type": "completions",
        "--tokenizer": setting.checkpoint,
        "--concurrency": load.concurrency,
        "--request-count": load.requests,
        "--isl": load.prompt_tokens,
        "--osl": load.output_tokens,
        "--streaming": None,
        "--extra-inputs": "ignore_eos:true",
        "--ui": "none",
        "--output-artifact-dir": folder,
    }
    setting.run(["aiperf", "profile"], flags, {"HF_HUB_OFFLINE": ""})  # set to anything, it reads no folder either
    (path,) = folder.rglob("profile_export_aiperf.json")
    raw = _read(path)
    got = (raw["completed_request_count"]["avg"], raw["total_usage_completion_tokens"]["avg"])
    return {"passed": got == (load.requests, load.requests * load.output_tokens), "raw": raw}


def vllm_bench(setting: Setting) -> dict[str, Any]:
    """Streamed completions of random token ids."""
    load = SMOKE if setting.is_smoke else Load()
    path = setting.scratch / "vllm.json"
    flags = {
        "--backend": "openai",
        "--base-url": setting.url,
        "--model": setting.model,
        "--tokenizer": setting.checkpoint,
        "--dataset-name": "random",
        "--random-input-len": load.prompt_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": load.requests,
        "--max-concurrency": load.concurrency,
        "--ignore-eos": None,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,99",
        "--save-result": None,
        "--result-filename": path,
    }
    setting.run(["python", str(VLLM), "bench", "serve"], flags, {"VLLM_TARGET_DEVICE": "cpu"})
    raw = _read(path)
    asked = load.requests * load.output_tokens
    return {"passed": (raw["completed"], raw["total_output_tokens"]) == (load.requests, asked), "raw": raw}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
