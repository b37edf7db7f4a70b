"""full_check(model): the real weights in the real build against transformers' own model of them, on a few texts.

Three runs, one after the other, so that the model is in memory once: the build as it serves (greedy tokens from the
engine, then logits of every position, over pages and in chunks), transformers in the dtype that is served, which shows
what rounding does by itself, and transformers in float32, the reference that both are held against.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy.build import build, resolve_device
from autodeploy.compile.program import Program, Progress
from autodeploy.config import Options
from autodeploy.debug.agreement import agreement
from autodeploy.debug.clone import logits_of
from autodeploy.debug.full_report import FullReport, Perplexity, PromptResult
from autodeploy.debug.original import Original, original_of
from autodeploy.debug.packed_run import Span, fresh_states, step_batch
from autodeploy.debug.texts import PROMPTS, ZEN, zen_of_python
from autodeploy.errors import ConfigError, InvalidRequestError, OutOfMemoryError
from autodeploy.memory import available_bytes
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams

Run = Callable[[Tensor], Tensor]
"""token ids `[T]` -> logits `[T, V]` on the CPU"""

MAX_TOKENS = 32
WINDOW = 512
"""tokens in a window of the text whose perplexity is measured"""
CHUNK = 96
"""tokens that a step of the build takes, so that longer prompts take several"""
RANDOM_LENGTHS = (5, 17, 60, 250)
"""tokens of prompts where there is no tokenizer"""
GIB = 2**30


@dataclass
class _Text:
    """One prompt, what was generated after it, and the logits of the runs that the reference comes after."""

    prompt: str | None
    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    ours: Tensor = field(default_factory=lambda: torch.empty(0))
    transformers: Tensor | None = None

    @property
    def row(self) -> Tensor:
        """Every token that a logit is wanted after."""
        return torch.tensor([*self.prompt_ids, *self.new_ids[:-1]])


@dataclass(frozen=True)
class _Passage:
    """A text whose perplexity is measured."""

    source: str
    ids: list[int]
    window: int

    def perplexity(self, run: Run, progress: Progress) -> float:
        """exp of the mean negative log likelihood of all tokens but the first of each window."""
        total, count = 0.0, 0
        for start in range(0, len(self.ids), self.window):
            ids = torch.tensor(self.ids[start : start + self.window])
            if len(ids) < 2:
                continue
            progress(f"perplexity, token {start} of {len(self.ids)}")
            logits = run(ids)[:-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(ids) - 1
        return math.exp(total / count)


def full_check(
    model: str | nn.Module,
    options: Options | None = None,
    *,
    prompts: Sequence[str | Sequence[int]] | None = None,
    max_tokens: int = MAX_TOKENS,
    perplexity: tuple[str, str] | None = None,
    progress: Progress | None = None,
) -> FullReport:
    """Compare a build with transformers' own run of the same weights.

    Args:
        model: as for `build`.
        options: as for `build`; the build is the one that these options serve with.
        prompts: texts or token ids; default: a few built-in ones, random token ids where there is no tokenizer.
        max_tokens: tokens to generate after each prompt.
        perplexity: (name, text) whose perplexity is measured; default: the Zen of Python.
        progress: called with one line when a step begins.
    Raises:
        ConfigError, InvalidRequestError: options or texts that cannot be run.
        OutOfMemoryError: the reference, in float32, does not fit; refused before anything is loaded.
        AutoDeployError: from building; UnsupportedModelError also where transformers itself cannot load the model.
    """
    options = options or Options()
    if max_tokens < 1:
        raise ConfigError(f"at least one token must be generated, got max_tokens={max_tokens}")
    progress = progress or (lambda _: None)
    progress("finding the model")
    original = original_of(model, options.model)
    device = resolve_device(options.compile.device)
    _require_memory(original, device)
    given = _given_texts(original, prompts)
    program = build(original.buildable, options, progress=progress)
    texts = given if given is not None else _default_texts(original, program, max_tokens)
    _require_memory(original, device, program, sum(len(text.prompt_ids) + max_tokens for text in texts))
    comparison = _Comparison(texts, _passage(original, perplexity, program), progress)
    facts, dtype = _facts(original, program), program.dtype
    comparison.serve(program, options, max_tokens)
    del program  # its weights leave memory before the next come in
    gc.collect()
    if dtype != torch.float32:
        comparison.run_original(original, dtype, device)
    comparison.run_original(original, torch.float32, device)
    return comparison.report(facts)


@dataclass
class _Comparison:
    """The runs, in order: `serve`, `run_original` in the dtype that is served, `run_original` in float32."""

    texts: list[_Text]
    passage: _Passage | None
    progress: Progress
    results: list[PromptResult] = field(default_factory=list)
    perplexities: dict[str, float] = field(default_factory=dict)

    def serve(self, program: Program, options: Options, max_tokens: int) -> None:
        """Greedy tokens of all prompts, generated together as they would be served; then logits of every position."""
        engine = Engine(program, options.engine, options.model.max_model_len)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for index, text in enumerate(self.texts):
            engine.add_request(str(index), text.prompt_ids, params)
        while engine.has_unfinished_requests():
            self.progress(f"this build: generating, {sum(len(text.new_ids) for text in self.texts)} tokens so far")
            for output in engine.step():
                self.texts[int(output.request_id)].new_ids.extend(output.token_ids)
        self._measure("this build", "ours", _run_of_program(program, options.engine.page_size), _keep_ours)

    def run_original(self, original: Original, dtype: torch.dtype, device: torch.device) -> None:
        """transformers' own module along the texts that were generated; float32 comes last and ends the comparison."""
        is_reference = dtype == torch.float32
        label = f"transformers, {_name(dtype)}"
        self.progress(f"{label}: loading")
        with original.loaded(dtype, device) as module:
            run = lambda ids: logits_of(module, [ids.to(device)]).cpu()  # noqa: E731
            if is_reference:
                self._measure(label, "reference", run, lambda text, logits: self.results.append(_result(text, logits)))
            else:
                self._measure(label, "transformers", run, lambda text, logits: _keep_rounded(text, logits.to(dtype)))

    def report(self, facts: dict[str, Any]) -> FullReport:
        """What was found."""
        if self.passage is None:
            return FullReport(facts, self.results)
        perplexity = Perplexity(
            source=self.passage.source,
            num_tokens=len(self.passage.ids),
            window=self.passage.window,
            reference=self.perplexities["reference"],
            ours=self.perplexities["ours"],
            transformers=self.perplexities.get("transformers"),
        )
        return FullReport(facts, self.results, perplexity)

    def _measure(self, label: str, name: str, run: Run, take: Callable[[_Text, Tensor], None]) -> None:
        for index, text in enumerate(self.texts):
            self.progress(f"{label}: prompt {index + 1} of {len(self.texts)}")
            take(text, run(text.row))
        if self.passage is not None:
            self.perplexities[name] = self.passage.perplexity(run, lambda line: self.progress(f"{label}: {line}"))


def _keep_ours(text: _Text, logits: Tensor) -> None:
    text.ours = logits


def _keep_rounded(text: _Text, logits: Tensor) -> None:
    text.transformers = logits


def _require_memory(
    original: Original, device: torch.device, program: Program | None = None, num_tokens: int = 0
) -> None:
    """Raises OutOfMemoryError unless the float32 reference fits, and the logits that are kept for it to be compared.

    With a program in memory, its weights will have left by the time the reference comes.
    """
    kept = 0 if program is None else 2 * num_tokens * program.vocab_size * program.dtype.itemsize
    needed = 4 * original.num_parameters + kept
    available = available_bytes(device) + (0 if program is None else program.weight_bytes)
    if needed > available:
        raise OutOfMemoryError(
            f"the reference, {original.num_parameters:,} parameters in float32, needs with the logits to compare"
            f" {needed / GIB:.2f} GiB, {available / GIB:.2f} GiB are available on {device}; check without --full, which"
            " takes a tiny clone, give fewer and shorter prompts, or take a machine with more memory"
        )


def _given_texts(original: Original, prompts: Sequence[str | Sequence[int]] | None) -> list[_Text] | None:
    """The user's prompts as token ids; None without any."""
    if prompts is None:
        return None
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if original.tokenizer is None:
                raise InvalidRequestError("there is no tokenizer for a text prompt; give tokenizer=, or token ids")
            texts.append(_Text(prompt, original.tokenizer.encode(prompt)))
        else:
            texts.append(_Text(None, list(prompt)))
    if not texts or not all(text.prompt_ids for text in texts):
        raise InvalidRequestError("a prompt is empty; give at least one token")
    return texts


def _default_texts(original: Original, program: Program, max_tokens: int) -> list[_Text]:
    """Built-in prompts, as much of each as the context has room for."""
    room = max(1, (program.max_model_len or 2**31) - max_tokens)
    if original.tokenizer is not None:
        return [_Text(prompt, original.tokenizer.encode(prompt)[:room]) for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    return [
        _Text(None, torch.randint(0, program.vocab_size, (min(length, room),), generator=generator).tolist())
        for length in RANDOM_LENGTHS
    ]


def _passage(original: Original, given: tuple[str, str] | None, program: Program) -> _Passage | None:
    """The text whose perplexity is measured; None where nobody can make tokens of one."""
    if original.tokenizer is None:
        if given is not None:
            raise InvalidRequestError("there is no tokenizer for the text whose perplexity is wanted; give tokenizer=")
        return None
    source, text = given or (ZEN, zen_of_python())
    ids = original.tokenizer.encode(text)
    if len(ids) < 2:
        raise InvalidRequestError(f"{source} has {len(ids)} tokens; perplexity needs at least two")
    return _Passage(source, ids, min(WINDOW, program.max_model_len or WINDOW))


def _run_of_program(program: Program, page_size: int) -> Run:
    """Logits of every position of a sequence, over pages, in chunks."""

    def run(ids: Tensor) -> Tensor:
        states = fresh_states(program.states, [ids], program.device, page_size)
        parts = []
        for start in range(0, len(ids), CHUNK):
            step = [Span(0, start, min(len(ids), start + CHUNK))]
            batch = step_batch(program.states, [ids], step, program.device, page_size)
            parts.append(program.run(batch, states).cpu())
        return torch.cat(parts)

    return run


def _result(text: _Text, reference: Tensor) -> PromptResult:
    num_new = len(text.new_ids)
    rounded = None if text.transformers is None else agreement(text.transformers, reference, num_new)
    return PromptResult(
        prompt=text.prompt,
        num_prompt_tokens=len(text.prompt_ids),
        token_ids=text.new_ids,
        ours=agreement(text.ours, reference, num_new, torch.tensor(text.new_ids)),
        transformers=rounded,
    )


def _facts(original: Original, program: Program) -> dict[str, Any]:
    wanted = ("architecture", "dtype", "device", "compile_backend", "lowered_nodes", "weight_bytes", "isolation")
    built = {name: program.report.facts[name] for name in wanted if name in program.report.facts}
    return {"model": original.name, "parameters": original.num_parameters} | built


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
