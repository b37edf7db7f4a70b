"""Guided decoding: what an output must look like goes in, the tokens that may come next come out.

The work is llguidance's: derivatives of regular expressions and an Earley parser, each step bounded by a budget. What
this module adds are its bounds in time and memory, a cache, and its errors as ours.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.structured_outputs import PARAMETER, StructuredOutputsParams
from autodeploy.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Result = TypeVar("Result")

MAX_CACHED_GRAMMARS = 64
COMPILER_STACK_BYTES = 512 * 2**20
"""Address space, not memory. llguidance compiles by recursion, and a chain of rules would end the process on less."""

NOTHING_FITS = "nothing satisfies it"

WHITESPACE = r"[ \t\n\r]{0,16}"
"""Between the parts of JSON. Bounded: a model that likes spaces would otherwise fill the context with them."""

_LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Half a second of one core at most for a grammar, milliseconds for a step, and 40 MB for what a matcher learns."""


class Matcher:
    """Follows one output through its grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._followed: list[int] = []
        self._bits: NDArray[np.int32] = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go to the place after these tokens; tokens followed before that are not among them are taken back."""
        kept = min(len(self._followed), len(token_ids))
        while kept and self._followed[:kept] != list(token_ids[:kept]):
            kept -= 1
        if kept < len(self._followed):
            self._matcher.rollback(len(self._followed) - kept)
        self._matcher.consume_tokens(list(token_ids[kept:]))
        self._followed = list(token_ids)

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next; takes a fraction of what it takes to know all that may. Of tokens that end
        the output only `allowed` knows.

        Bytes that have to come next are to be cut into tokens as the tokenizer cuts them.
        """
        if self._matcher.is_error():
            return False
        forced = self._matcher.compute_ff_tokens()
        return bool(forced[0] == token_id if forced else self._matcher.validate_tokens([token_id]) == 1)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, by token id; none after an error."""
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=np.bool_)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: self._vocab_size].view(np.bool_)

    @property
    def problem(self) -> str | None:
        """Why nothing is allowed any more, if that is an error."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    def copy(self) -> "Matcher":
        """A matcher of its own at the start, given one that has followed nothing."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class GrammarCompiler:
    """Compiles what requests ask for, and keeps the latest. Safe to call from several threads.

    Args:
        vocab_size: of the model's logits.
        eos_token_ids: tokens that end an output; allowed where the grammar is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        known = {token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size}
        self._eos_token_ids = sorted(known) or [tokenizer.hf.eos_token_id]
        self._kept: OrderedDict[tuple[str, str], Matcher] = OrderedDict()
        self._lookup = threading.Lock()
        self._compiling = threading.Lock()  # one at a time: many hostile ones may take one core, not all
        self._vocabulary: LLTokenizer | None = None

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """A matcher at the start of an output.

        Raises:
            InvalidRequestError: it cannot be compiled, or not within the limits.
        """
        compiler, found = params.compiled or (None, None)
        if compiler is not self or found is None:
            found = self._kept_or_compiled(params)
            # Others may take its place among those kept before the engine asks, and the engine should not compile.
            object.__setattr__(params, "compiled", (self, found))
        copy: Matcher = found.copy()
        return copy

    def _kept_or_compiled(self, params: StructuredOutputsParams) -> Matcher:
        with self._lookup:
            found = self._kept.get(params.source)
            if found is not None:
                self._kept.move_to_end(params.source)
                return found
        with self._compiling:
            found = _on_a_large_stack(lambda: self._compile(*params.source))
        with self._lookup:
            self._kept[params.source] = found
            while len(self._kept) > MAX_CACHED_GRAMMARS:
                self._kept.popitem(last=False)
        return found

    def _compile(self, kind: str, text: str) -> Matcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ModuleNotFoundError as error:
            raise InvalidRequestError(
                "structured output needs the package 'llguidance': pip install 'autodeploy[serve]'", PARAMETER
            ) from error
        grammar = _grammar_text(LLMatcher, kind, text)
        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._known_tokens(), grammar, log_level=0, limits=limits)
        made = Matcher(matcher, max(self._vocab_size, len(self._tokenizer.hf)))
        # The first mask shows what a grammar costs that compiles; a copy of it begins with what was learnt.
        possible = made.problem is None and bool(made.allowed().any())
        if made.problem is not None or not possible:
            reason = made.problem or NOTHING_FITS
            raise InvalidRequestError(f"{PARAMETER}: this {kind} cannot be compiled: {reason}", PARAMETER)
        return made

    def _known_tokens(self) -> "LLTokenizer":
        if self._vocabulary is None:
            from llguidance.hf import from_tokenizer

            size = max(self._vocab_size, len(self._tokenizer.hf))
            try:
                tokenizer: Any = self._tokenizer.hf
                self._vocabulary = from_tokenizer(tokenizer, n_vocab=size, eos_token=self._eos_token_ids)
            except Exception as error:  # a slow tokenizer, or one that llguidance cannot read
                raise InvalidRequestError(
                    f"this model's tokenizer cannot be used for structured output: {error}", PARAMETER
                ) from error
        return self._vocabulary


def _grammar_text(matcher: Any, kind: str, text: str) -> str:
    """llguidance's own form of a source."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        if kind == "json":
            return str(matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE}))
        if kind == "regex":
            return str(matcher.grammar_from_regex(text))
        if kind == "choice":
            return str(matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text)))))
        return str(matcher.grammar_from_lark(any_to_lark(text)))
    except Exception as error:  # parsers of foreign text: whatever they raise is about the text
        raise InvalidRequestError(
            f"{PARAMETER}: this {kind} cannot be read: {_reason(str(error))}", PARAMETER
        ) from error


def _reason(message: str) -> str:
    """One line of an error of llguidance; what it says of itself stays here."""
    if message.startswith("panic"):
        return "it is too complex"
    if message.startswith("NoExtension"):
        return NOTHING_FITS
    first, *others = message.strip().splitlines() or [""]
    # A regular expression that cannot be parsed is shown over several lines, the last of which says why.
    why = next((line.removeprefix("error:") for line in others if line.startswith("error:")), "")
    return (first[:200] + why)[:300]


def _on_a_large_stack(work: Callable[[], Result]) -> Result:
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(COMPILER_STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="autodeploy-grammar", daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
