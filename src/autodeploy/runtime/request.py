"""Requests: what a caller asks for and gets back, and the mutable state of each sequence in flight (no torch)."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypedDict

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.structured_outputs import StructuredOutputsParams

MAX_SEQUENCES_PER_REQUEST = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_BAD_WORDS = 256
MAX_SALT_LENGTH = 1024
MAX_TIMEOUT_SECONDS = 1e9
MAX_TEMPERATURE = 1e6
GREEDY_TEMPERATURE = 1e-5
"""Below this temperature sampling is greedy: dividing by it would only overflow."""

REAL_RANGES: dict[str, tuple[float, float]] = {
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-3, 1e3),
    "temperature": (0.0, MAX_TEMPERATURE),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
}
WHOLE_RANGES: dict[str, tuple[int, int | None]] = {
    "n": (1, MAX_SEQUENCES_PER_REQUEST),
    "top_k": (-1, None),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
"""Least and greatest value of the numeric fields of `SamplingParams`; `top_p` is above 0 besides."""
_MAY_BE_NONE = ("seed", "max_tokens", "logprobs", "prompt_logprobs")

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends; checked on construction.

    Attributes:
        n: sequences generated from the same prompt.
        presence_penalty: subtracted once from the logits of tokens already generated.
        frequency_penalty: subtracted from the logits of generated tokens, times how often each occurred.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or output.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the fewest most likely tokens that together have this probability.
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one.
        seed: makes this request's randomness its own and reproducible; sequence i of n uses `seed + i`.
        stop: strings that end the text; acted on by the text layer, which aborts the sequence. Kept as a tuple.
        stop_token_ids: tokens that end a sequence besides the model's own end-of-sequence tokens. Kept as a tuple.
        ignore_eos: go on after the model's end-of-sequence tokens.
        max_tokens: most tokens generated per sequence; None means until the context is full.
        min_tokens: end-of-sequence and stop tokens are not sampled before this many tokens.
        logprobs: return log-probabilities of this many most likely tokens and of the sampled one.
        prompt_logprobs: the same for each token of the prompt but the first, which nothing predicts.
        logit_bias: added to the logits of these tokens. Kept as a copy.
        allowed_token_ids: no other tokens are sampled. Kept as a tuple.
        bad_words: texts that are never completed; the text layer turns them into `bad_token_sequences`.
        bad_token_sequences: token sequences whose last token is not sampled after the others. Kept as tuples.
        structured_outputs: what the output must look like.
        detokenize, skip_special_tokens, include_stop_str_in_output: for the text layer.

    Raises:
        InvalidRequestError: a value of the wrong type or outside its range; `parameter` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | SequenceOf[str] | None = None
    stop_token_ids: SequenceOf[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: SequenceOf[int] | None = None
    bad_words: SequenceOf[str] | None = None
    bad_token_sequences: SequenceOf[SequenceOf[int]] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "must be true or false")
        self._check_structured_outputs()
        # Copied into tuples, so that what was checked cannot be changed behind our back.
        object.__setattr__(self, "stop", _checked_strings("stop", self.stop, MAX_STOP_STRINGS))
        object.__setattr__(self, "stop_token_ids", _checked_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _checked_logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _checked_allowed_ids(self.allowed_token_ids))
        object.__setattr__(self, "bad_words", _checked_strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        object.__setattr__(self, "bad_token_sequences", _checked_bad_sequences(self.bad_token_sequences))

    def _check_numbers(self) -> None:
        for name, (lowest, highest) in REAL_RANGES.items():
            _check_real(name, getattr(self, name), lowest, highest)
        for name, (least, most) in WHOLE_RANGES.items():
            if not (name in _MAY_BE_NONE and getattr(self, name) is None):
                _check_int(name, getattr(self, name), least, most)
        if self.top_p == 0:
            raise _invalid("top_p", self.top_p, "must be above 0; for greedy decoding set temperature=0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", self.min_tokens, f"must be at most max_tokens, which is {self.max_tokens}")

    def _check_structured_outputs(self) -> None:
        if self.structured_outputs is None:
            return
        name = "structured_outputs"
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise _invalid(name, self.structured_outputs, "must be StructuredOutputsParams")
        if self.ignore_eos or self.min_tokens:
            raise InvalidRequestError(
                f"{name} ends where its grammar does; ignore_eos and min_tokens contradict that, leave them out", name
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_constraints(self) -> bool:
        """Some tokens are more or less welcome than the model has it."""
        return self.structured_outputs is not None or self.has_constraints_beside_grammar

    @property
    def has_constraints_beside_grammar(self) -> bool:
        return self.allowed_token_ids is not None or bool(
            self.logit_bias or self.bad_token_sequences or self.min_tokens
        )

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _invalid(name: str, value: object, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r}; it {expected}", parameter=name)


def _check_real(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(name, value, "must be a number")
    if not low <= value <= high:  # NaN compares false and infinity is out of range
        raise _invalid(name, value, f"must be a number from {low:g} to {high:g}")


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    expected = f"must be a whole number of at least {low}" + ("" if high is None else f" and at most {high}")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise _invalid(name, value, expected)


def _checked_strings(name: str, given: object, most: int) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(strings, SequenceOf) or not all(isinstance(string, str) for string in strings):
        raise _invalid(name, given, "must be a string or a list of strings")
    if len(strings) > most:
        raise InvalidRequestError(f"{name} has {len(strings)} strings; at most {most} are allowed", name)
    if not all(0 < len(string) <= MAX_STOP_STRING_LENGTH for string in strings):
        raise InvalidRequestError(f"{name} strings must have 1 to {MAX_STOP_STRING_LENGTH} characters each", name)
    return tuple(strings)


def _checked_ids(name: str, token_ids: object, most: int | None = MAX_STOP_TOKEN_IDS) -> tuple[int, ...]:
    ids = () if token_ids is None else token_ids
    if not isinstance(ids, SequenceOf) or isinstance(ids, str | bytes):
        raise _invalid(name, token_ids, "must be a list of token ids")
    if most is not None and len(ids) > most:
        raise InvalidRequestError(f"{name} has {len(ids)} ids; at most {most} are allowed", name)
    for token_id in ids:
        _check_int(name, token_id, 0, None)
    return tuple(ids)


def _checked_allowed_ids(token_ids: object) -> tuple[int, ...]:
    name = "allowed_token_ids"
    ids = _checked_ids(name, token_ids, most=None)
    if not ids:
        raise InvalidRequestError(f"{name} is empty, so no token could be sampled; give at least one id", name)
    return tuple(sorted(set(ids)))


def _checked_logit_bias(given: object) -> dict[int, float]:
    name = "logit_bias"
    biases = {} if given is None else given
    if not isinstance(biases, Mapping):
        raise _invalid(name, given, "must map token ids to numbers")
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(f"{name} has {len(biases)} entries; at most {MAX_LOGIT_BIASES} are allowed", name)
    for token_id, bias in biases.items():
        _check_int(name, token_id, 0, None)
        _check_real(name, bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return {token_id: float(bias) for token_id, bias in biases.items()}


def _checked_bad_sequences(given: object) -> tuple[tuple[int, ...], ...]:
    name = "bad_token_sequences"
    sequences = () if given is None else given
    if not isinstance(sequences, SequenceOf) or isinstance(sequences, str | bytes):
        raise _invalid(name, given, "must be a list of lists of token ids")
    checked = tuple(_checked_ids(name, token_ids, MAX_STOP_STRING_LENGTH) for token_ids in sequences)
    if not all(checked):
        raise InvalidRequestError(f"{name} has an empty sequence; each needs at least one token", name)
    return checked


@dataclass(frozen=True)
class Limits:
    """What the program in use allows: ids below `vocab_size`, `max_model_len` tokens of prompt and output together."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: SequenceOf[int] = ()


class RequestOptions(TypedDict, total=False):
    """How a request is served, as keyword arguments that every layer passes on. Each may be left out.

    Attributes:
        priority: a lower one runs sooner; 0 by default.
        cache_salt: prefixes are shared only among requests with the same salt; None, the default, is one too.
        timeout_seconds: a sequence that is not finished so long after the request came, waiting or running, ends with
            `finish_reason="timeout"`; None, the default, is never.
    """

    priority: int
    cache_salt: str | None
    timeout_seconds: float | None


@dataclass(frozen=True)
class Request:
    """One request. `arrival` counts requests in the order they came; for the others see `RequestOptions`."""

    request_id: str
    prompt_token_ids: SequenceOf[int]
    params: SamplingParams
    arrival: int
    priority: int = 0
    cache_salt: str | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token under the model itself, and its rank (1 = most likely)."""

    logprob: float
    rank: int


@dataclass(slots=True)
class TokenOutput:
    """What one step added to one sequence.

    Attributes:
        request_id, index: which sequence.
        token_ids: the new tokens; empty when a sequence ends without one.
        logprobs: per new token, log-probabilities by token id (the sampled token first); None when not asked for.
        prompt_logprobs: with a sequence's first output, per token of the prompt, None for the first of them; None when
            not asked for.
        finish_reason: None while the sequence goes on.
        stop_reason: the token of `stop_token_ids` that ended it; None for the model's own end-of-sequence tokens.
            With `finish_reason="error"` or "timeout", one sentence that says why.
        num_cached_tokens: tokens of the prompt whose states were found in the prefix cache.
        first_scheduled_time: when its sequence first left the queue, on the engine's clock; None: it never did.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    first_scheduled_time: float | None = None


class Status(Enum):
    """Where a sequence is; a preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sequence in flight: its tokens, how many of them the states hold, and how it ended.

    Attributes:
        token_ids: prompt and output so far.
        num_computed_tokens: leading tokens whose states are in memory; 0 again after a preemption.
        num_cached_tokens: those that were found in the prefix cache when it first started; None before.
        first_scheduled_time: when it first left the queue, on the engine's clock; None before.
        draft_token_ids: what may follow `token_ids`, to be verified in this step.
        pending_row: the row of the step in flight that its next token is sampled from; None when all are known.
        page_hashes, snapshot_tokens, shared_tokens: notes of the prefix cache.
        slot: row in the page tables and slot states; 0 while it has none. The pages are in `StateAllocator`'s tables.
        order: sort key; the smallest runs first and is preempted last.
        stop_ids: tokens that end it.
        is_plain: argmax of the logits is all the sampling it needs.
        is_plainly_guided: argmax of the logits that its grammar allows is.
        is_unconstrained: neither penalties nor constraints change its logits.
        waits_for_tokens: what it may say next depends on its latest tokens in a way that only the host can follow.
        prompt_logprobs: those known so far, if they are asked for; handed out with the first output.
    """

    __slots__ = (
        "draft_token_ids",
        "eos_ids",
        "finish_reason",
        "first_scheduled_time",
        "index",
        "is_plain",
        "is_plainly_guided",
        "is_unconstrained",
        "max_length",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "order",
        "page_hashes",
        "params",
        "pending_row",
        "prompt_logprobs",
        "request",
        "shared_tokens",
        "slot",
        "snapshot_tokens",
        "status",
        "stop_ids",
        "stop_reason",
        "token_ids",
        "waits_for_tokens",
    )

    def __init__(self, request: Request, index: int, limits: Limits) -> None:
        params = request.params
        self.request = request
        self.params = params
        self.index = index
        self.order = (request.priority, request.arrival, index)
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_length = limits.max_model_len
        if params.max_tokens is not None:
            self.max_length = min(self.max_length, self.num_prompt_tokens + params.max_tokens)
        # A checkpoint may name tokens that its own vocabulary does not have; they cannot be sampled.
        eos_ids = frozenset(token_id for token_id in limits.eos_token_ids if 0 <= token_id < limits.vocab_size)
        self.eos_ids: frozenset[int] = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = self.eos_ids.union(params.stop_token_ids or ())
        takes_best = params.is_greedy and not params.has_penalties and params.logprobs is None
        takes_best &= not params.has_constraints_beside_grammar
        self.is_plain = takes_best and params.structured_outputs is None
        self.is_plainly_guided = takes_best and params.structured_outputs is not None
        self.is_unconstrained = not (params.has_penalties or params.has_constraints)
        bad_runs = any(len(bad) > 1 for bad in params.bad_token_sequences or ())
        self.waits_for_tokens = bad_runs or params.structured_outputs is not None
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self.pending_row: int | None = None
        self.draft_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.first_scheduled_time: float | None = None
        self.page_hashes: list[bytes] = []
        self.snapshot_tokens = self.shared_tokens = 0
        self.slot = 0
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """All its tokens, the one that is being sampled included."""
        return len(self.token_ids) + (self.pending_row is not None)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and self.num_output_tokens == 0

    def append(self, token_id: int) -> None:
        """Add a sampled token and decide whether it ends the sequence. A stop token is kept as the last token."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            self.finish_reason = "stop"
            self.stop_reason = None if token_id in self.eos_ids else token_id
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = "length"

    def output(self, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None = None) -> TokenOutput:
        """What to tell the caller: these new tokens, and how the sequence ended, if it did."""
        is_first = self.params.prompt_logprobs is not None and 0 < len(token_ids) == self.num_output_tokens
        return TokenOutput(  # by position: by name it takes twice as long
            self.request.request_id,
            self.index,
            token_ids,
            logprobs,
            self.finish_reason,
            self.stop_reason,
            self.prompt_logprobs if is_first else None,
            self.num_cached_tokens or 0,
            self.first_scheduled_time,
        )


def new_sequences(request: Request, limits: Limits) -> list[Sequence]:
    """The n sequences of a request, none of them started.

    Raises:
        InvalidRequestError: a prompt that is empty, not a list of ints or too long; a token outside the vocabulary; a
            priority that is no int; a salt that is no text or too long; a timeout that is no number.
    """
    _check_prompt(request.prompt_token_ids, limits)
    _check_int("priority", request.priority, -(2**31), 2**31 - 1)
    if request.timeout_seconds is not None:
        _check_real("timeout_seconds", request.timeout_seconds, 0.0, MAX_TIMEOUT_SECONDS)
    params = request.params
    bad_tokens = [token_id for bad in params.bad_token_sequences or () for token_id in bad]
    for name, token_ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", list(params.logit_bias or ())),
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_token_sequences", bad_tokens),
    ):
        if token_ids:
            _check_token_ids(name, token_ids, limits.vocab_size)
    if params.bad_words:
        raise InvalidRequestError("bad_words need a tokenizer; give bad_token_sequences instead", "bad_words")
    salt = request.cache_salt
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_LENGTH):
        raise _invalid("cache_salt", salt, f"must be text of 1 to {MAX_SALT_LENGTH} characters")
    if request.params.stop_token_ids:
        _check_token_ids("stop_token_ids", request.params.stop_token_ids, limits.vocab_size)
    return [Sequence(request, index, limits) for index in range(request.params.n)]


def _check_prompt(token_ids: SequenceOf[int], limits: Limits) -> None:
    name = "prompt_token_ids"
    if not isinstance(token_ids, SequenceOf) or isinstance(token_ids, str | bytes):
        raise InvalidRequestError(f"{name} is of type {type(token_ids).__name__}; it must be a list of ints", name)
    if len(token_ids) == 0:
        raise InvalidRequestError("the prompt is empty; give at least one token", name)
    if len(token_ids) >= limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids)} tokens, but prompt and output together may have {limits.max_model_len}; "
            f"shorten the prompt to at most {limits.max_model_len - 1} tokens or raise max_model_len",
            name,
        )
    _check_token_ids(name, token_ids, limits.vocab_size)


def _check_token_ids(name: str, token_ids: SequenceOf[int], vocab_size: int) -> None:
    if set(map(type, token_ids)) != {int}:  # the exact type: bool is an int, and a NumPy int is not
        at, bad = next((at, bad) for at, bad in enumerate(token_ids) if type(bad) is not int)
        raise InvalidRequestError(f"{name}[{at}] is {bad!r} of type {type(bad).__name__}; it must be an int", name)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        at, bad = next((at, bad) for at, bad in enumerate(token_ids) if not 0 <= bad < vocab_size)
        raise InvalidRequestError(
            f"{name}[{at}] is {bad}, which is not a token of this model; ids go from 0 to {vocab_size - 1}", name
        )
