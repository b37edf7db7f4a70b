"""Seconds from launching a process to its first token, AutoDeploy beside transformers, as markdown and JSON.

    python benchmarks/starts.py smollm2 --rounds 5 --output benchmarks/results

Each start is a whole process that imports what its side needs and nothing else, reads the prompt as text, and prints
when it has the first token's text. Cold: nothing kept in AutoDeploy's cache directory, its kernels not compiled. Warm:
the cold start's graph and kernels are there. The sides take turns, because a shared machine changes its speed by the
minute; the files' pages are in the system's cache for all of them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The history of the printing press begins with movable type. " * 12

AUTODEPLOY = """
import asyncio, sys
from autodeploy import LLM, SamplingParams
async def first(llm):
    async for output in llm.generate_async(sys.argv[2], SamplingParams(max_tokens=1, temperature=0.0), streaming=True):
        print("first", repr(output.outputs[0].text), flush=True)
with LLM(sys.argv[1]) as llm:
    asyncio.run(first(llm))
"""
TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = tokenizer(sys.argv[2], return_tensors="pt")
tokens = model.generate(**ids, do_sample=False, max_new_tokens=1{arguments})
print("first", repr(tokenizer.decode(tokens[0, -1])), flush=True)
"""
SUBJECTS = {
    "autodeploy": AUTODEPLOY,
    "transformers eager": TRANSFORMERS.format(arguments=""),
    "transformers static compiled": "from transformers import CompileConfig\nconfig = CompileConfig(mode='default')\n"
    + "config._compile_all_devices = True\n"
    + TRANSFORMERS.format(arguments=', cache_implementation="static", compile_config=config'),
}


def start(subject: str, folder: str, cache: str, text: str) -> float:
    """Seconds from launch to the first token of one process, which is then left to end."""
    own = {"AUTODEPLOY_CACHE": f"{cache}/autodeploy", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    began = time.perf_counter()
    command = [sys.executable, "-c", SUBJECTS[subject], folder, text]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # Bytecode is kept, as that of installed packages is.
    with subprocess.Popen(command, env=inherited | own, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("first")), None)
        seconds = time.perf_counter() - began
    if line is None or process.returncode != 0:
        raise SystemExit(f"{subject} ended with status {process.returncode} and no token")
    return seconds


def wait_for_graph(cache: str) -> None:
    """Return when the process that a cold start leaves behind has kept its graph."""
    graphs = Path(cache) / "autodeploy" / "graphs"
    while not any(path.name[0] != "." for path in graphs.glob("*")):
        time.sleep(0.2)
    time.sleep(2.0)  # and has ended


def one_round(folder: str, turn: int) -> dict[str, dict[str, float]]:
    """Seconds by kind of start and subject; cold and warm ones take turns."""
    seconds: dict[str, dict[str, float]] = {"cold": {}, "warm": {}}
    with tempfile.TemporaryDirectory() as cache:
        for kind in seconds:
            for subject in SUBJECTS:
                seconds[kind][subject] = start(subject, folder, cache, f"{turn}. {PROMPT}")
                print(f"round {turn}: {kind}: {subject}: {seconds[kind][subject]:.2f} s", flush=True)
                if subject == "autodeploy" and kind == "cold":
                    wait_for_graph(cache)
    return seconds


def markdown(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Medians with their range, and how many times sooner than transformers eager."""
    rows = ["| | cold, s | sooner | warm, s | sooner |", "|---|---|---|---|---|"]
    for subject in SUBJECTS:
        cells = [subject]
        for kind in ("cold", "warm"):
            values = [seconds[kind][subject] for seconds in rounds]
            base = statistics.median(seconds[kind]["transformers eager"] for seconds in rounds)
            middle = statistics.median(values)
            cells += [f"{middle:.2f} [{min(values):.2f}-{max(values):.2f}]", f"{base / middle:.2f}x"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the rounds and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args()

    from autodeploy.bench import record
    from autodeploy.config import ModelOptions
    from autodeploy.models.locate import locate_model
    from autodeploy.packaged_models import model_path

    folder = str(locate_model(model_path(given.model), ModelOptions()).folder)
    rounds = [one_round(folder, turn) for turn in range(given.rounds)]
    table = markdown(rounds)
    facts = {"command": sys.argv, "machine": record.machine(), "versions": record.versions()}
    name = f"starts_{platform.machine()}_{time.strftime('%Y%m%d-%H%M')}"
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / f"{name}.json").write_text(json.dumps({"rounds": rounds, **facts}, indent=2) + "\n", "utf-8")
    (given.output / f"{name}.md").write_text(f"{table}\n{facts}\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
