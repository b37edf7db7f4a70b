"""FullReport: what `check(full=True)` found for each prompt and for a text, the rule of its verdict, as data.

transformers' own run in the dtype that is served shows what rounding alone does. A build passes when it is at most
`SLACK` times as far from the float32 reference, or nearer than what counts as nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from autodeploy.debug.agreement import Agreement

SLACK = 2.0
TIE = {"float32": 1e-3, "bfloat16": 1.6e-2, "float16": 2e-3}
"""As a share of the largest logit: two tokens this near each other are a tie that rounding in a dtype may break."""
LEAST_KL = 1e-5
"""nats"""
LEAST_CHANGE = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 2e-3}
"""of perplexity, as a share of it"""


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt, and what was generated after it.

    Attributes:
        prompt: the text, or None where token ids were given.
        num_prompt_tokens: its length.
        token_ids: what the engine generated, greedily.
        ours: the build against the reference.
        transformers: transformers' own run in the dtype that is served; None where that is the reference's.
    """

    prompt: str | None
    num_prompt_tokens: int
    token_ids: list[int]
    ours: Agreement
    transformers: Agreement | None


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a text in windows side by side; the first token of each is given, not predicted.

    Attributes:
        source: which text.
        num_tokens: tokens of the text.
        window: tokens in a window, at most.
        reference, ours, transformers: perplexities; transformers' None where it runs in float32 anyway.
    """

    source: str
    num_tokens: int
    window: int
    reference: float
    ours: float
    transformers: float | None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One condition of the verdict: `found` must be at most `limit`."""

    name: str
    found: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        """False also where nothing finite was found."""
        return self.found <= self.limit


@dataclass
class FullReport:
    """Everything that was compared.

    Attributes:
        facts: model, dtype, device, backend, and what the build said of itself.
        prompts: in the order they were given.
        perplexity: None where there was no text or no tokenizer.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    prompts: list[PromptResult] = field(default_factory=list)
    perplexity: Perplexity | None = None

    @property
    def rules(self) -> list[Rule]:
        """The conditions of the verdict, with what was found."""
        dtype = str(self.facts["dtype"])
        ours = [result.ours for result in self.prompts]
        theirs = [result.transformers for result in self.prompts if result.transformers is not None]
        tie = TIE[dtype] * max(run.largest_logit for run in ours)
        rules = [
            Rule(
                name="another token chosen: the reference prefers its own by",
                found=_largest(run.worst_margin for run in ours),
                limit=SLACK * max(tie, *(run.worst_margin for run in theirs)) if theirs else tie,
                unit="nats",
            ),
            Rule(
                name="mean KL divergence from the reference",
                found=_mean_kl(ours),
                limit=SLACK * _mean_kl(theirs) + LEAST_KL,
                unit="nats",
            ),
        ]
        if self.perplexity is not None:
            reference, rounded = self.perplexity.reference, self.perplexity.transformers
            change = 0.0 if rounded is None else SLACK * abs(rounded / reference - 1)
            found = abs(self.perplexity.ours / reference - 1)
            limit = max(change, LEAST_CHANGE[dtype])
            rules.append(Rule(name="change of perplexity, as a share,", found=found, limit=limit, unit=""))
        return rules

    @property
    def passed(self) -> bool:
        """True when every rule holds."""
        return all(rule.passed for rule in self.rules)


def _largest(values: Iterable[float]) -> float:
    """The largest value, NaN if there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _mean_kl(runs: Sequence[Agreement]) -> float:
    """Over the positions of all texts; 0 where nothing was run."""
    positions = sum(run.num_positions for run in runs)
    return sum(run.kl_mean * run.num_positions for run in runs) / positions if positions else 0.0
