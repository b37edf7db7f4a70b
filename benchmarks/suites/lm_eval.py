"""lm-evaluation-harness: its scores of a server, beside those of its own `hf` backend on the same weights.

The tasks are local: paragraphs of Python's own documentation, which ships with every Python. Both sides compute in
float32, so scores agree within rounding, and answers of equal weights are equal texts.
"""

import json
import pydoc_data.topics
import random
import re
from pathlib import Path
from typing import Any

from suites.setting import Setting

TASKS = Path(__file__).parent / "tasks"
SCORED = ("documentation_choice", "documentation_perplexity", "documentation_continuation")
SPOKEN = ("documentation_continuation",)
WHOLE_TEXTS = "documentation_perplexity"
"""Its answers are log-probabilities alone, which the samples have as texts."""
TOLERANCE = 1e-3
"""Of a log-probability of a whole answer, in nats; of a score, relative."""


def paragraphs() -> list[str]:
    """Paragraphs of prose, in one line each."""
    found = []
    for topic in sorted(pydoc_data.topics.topics):
        for part in re.split(r"\n\s*\n", pydoc_data.topics.topics[topic]):
            text = " ".join(part.split())
            if 240 <= len(text) <= 600 and text[0].isupper() and text.endswith(".") and "|" not in text:
                found.append(text)
    return found


def write_tasks(folder: Path, number: int) -> None:
    """The data of the tasks: beginnings of paragraphs, how they go on, and three other ways to go on."""
    source = random.Random(0)
    chosen = source.sample(paragraphs(), number)
    halves = []
    for text in chosen:
        cut = text.index(" ", len(text) // 2)
        halves.append((text[:cut], text[cut + 1 :]))
    with (folder / "choice.jsonl").open("w") as choice, (folder / "continuation.jsonl").open("w") as continuation:
        for index, (begin, ending) in enumerate(halves):
            others = source.sample([other for at, (_, other) in enumerate(halves) if at != index], 3)
            answer = source.randrange(4)
            endings = [*others[:answer], ending, *others[answer:]]
            print(json.dumps({"begin": begin, "endings": endings, "answer": answer}), file=choice)
            print(json.dumps({"begin": begin, "ending": ending}), file=continuation)


def run(setting: Setting) -> dict[str, Any]:
    """Score the server by completions and by conversations, and the same weights without a server."""
    write_tasks(setting.scratch, 4 if setting.is_smoke else 24)
    remote = f"model={setting.model},tokenizer={setting.checkpoint},tokenizer_backend=huggingface,num_concurrent=8"
    completions = f"{remote},max_length=2048,base_url={setting.url}/v1/completions"
    chat = f"{remote},base_url={setting.url}/v1/chat/completions"
    direct = f"pretrained={setting.checkpoint},dtype=float32"
    compared = {
        "completions": compare(
            _evaluate(setting, "local-completions", completions, SCORED), _evaluate(setting, "hf", direct, SCORED)
        ),
        "chat": compare(
            _evaluate(setting, "local-chat-completions", chat, SPOKEN, is_chat=True),
            _evaluate(setting, "hf", direct, SPOKEN, is_chat=True),
        ),
    }
    return {"passed": all(task["agrees"] for tasks in compared.values() for task in tasks.values()), "tasks": compared}


def _evaluate(
    setting: Setting, backend: str, arguments: str, tasks: tuple[str, ...], *, is_chat: bool = False
) -> dict[str, Any]:
    """Task -> its scores and what was answered to each document."""
    output = setting.scratch / f"{backend}{'-chat' if is_chat else ''}"
    flags: dict[str, Any] = {
        "--model": backend,
        "--model_args": arguments,
        "--tasks": ",".join(tasks),
        "--include_path": TASKS,
        "--output_path": output,
        "--batch_size": 1,
        "--log_samples": None,
    }
    if is_chat:
        flags["--apply_chat_template"] = None
    setting.run(["lm_eval"], flags, {"OPENAI_API_KEY": "none"})
    (results,) = output.rglob("results_*.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]
    found: dict[str, Any] = {}
    for task in tasks:
        (samples,) = output.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        values = {key: value for key, value in scores[task].items() if isinstance(value, float)}
        found[task] = {"scores": values, "answers": answers(task, lines)}
    return found


def answers(task: str, samples: list[dict[str, Any]]) -> list[list[Any]]:
    """What was answered to each document, in the order of the documents."""
    found = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
    return [[float(each) for each in given] for given in found] if task == WHOLE_TEXTS else found


def compare(served: dict[str, Any], direct: dict[str, Any]) -> dict[str, Any]:
    """Task -> [score of the server, score without it] by metric, and how the answers differ one by one."""
    compared = {}
    for task, each in served.items():
        other = direct[task]
        scores = {name: [value, other["scores"][name]] for name, value in each["scores"].items()}
        pairs = list(zip(_leaves(each["answers"]), _leaves(other["answers"]), strict=True))
        differences = [abs(a - b) for a, b in pairs if isinstance(a, float)]
        unequal = sum(a != b for a, b in pairs if isinstance(a, str))
        close = all(abs(a - b) <= TOLERANCE * max(1.0, abs(b)) for a, b in scores.values())
        compared[task] = {
            "scores": scores,
            "documents": len(each["answers"]),
            "largest_difference_of_log_probabilities": max(differences, default=None),
            "unequal_answers": unequal,
            "agrees": close and max(differences, default=0.0) <= TOLERANCE and unequal == 0,
        }
    return compared


def _leaves(value: Any) -> list[Any]:
    """Texts, log-probabilities and whether they are the likeliest, in nested lists, in order."""
    if not isinstance(value, list):
        return [value]
    if len(value) == 2 and value[1] in ("True", "False"):  # a log-probability, as its log writes it
        return [float(value[0]), value[1]]
    return [leaf for part in value for leaf in _leaves(part)]
