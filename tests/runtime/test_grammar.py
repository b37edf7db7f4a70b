"""Guided outputs satisfy what was asked, whatever the model prefers; hostile grammars end in an error, soon."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import autodeploy
from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.structured_outputs import StructuredOutputsParams
from autodeploy.runtime.tokenizer import Tokenizer
from tests.runtime.test_sampler import make_sequence
from tests.runtime.tiny_tokenizers import byte_fallback, byte_level

BYTE_LEVEL = byte_level()
EOS: int = BYTE_LEVEL.hf.eos_token_id
VOCAB = 340  # some more than the tokenizer has, as models do
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def compiler(tokenizer: Tokenizer = BYTE_LEVEL, vocab_size: int = VOCAB) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size, [tokenizer.hf.eos_token_id])


GRAMMARS = compiler()


def generate(params: StructuredOutputsParams, seed: int, tokenizer: Tokenizer = BYTE_LEVEL, **more: Any) -> str:
    """What comes of random logits; the same machinery as in the engine, without the model."""
    vocab_size, eos = (VOCAB, EOS) if tokenizer is BYTE_LEVEL else (len(tokenizer.hf), tokenizer.hf.eos_token_id)
    sampler = Sampler(seed, GRAMMARS if tokenizer is BYTE_LEVEL else compiler(tokenizer, vocab_size))
    sequence = make_sequence(eos=(eos,), vocab=vocab_size, structured_outputs=params, **more)
    free = make_sequence(eos=(), vocab=vocab_size)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(400):
        logits = torch.randn(2, vocab_size, generator=generator) * 3
        guided, other = sampler.sample(logits, [sequence, free]).token_ids
        assert guided is not None and other is not None, sampler.constraints.problem(sequence)
        sequence.append(guided)
        if sequence.finish_reason:
            assert sequence.finish_reason == "stop"
            return tokenizer.decode(sequence.token_ids[1:-1], skip_special_tokens=False)
    raise AssertionError(f"no end: {tokenizer.decode(sequence.token_ids[1:])!r}")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_satisfy_a_json_schema(seed: int, temperature: float) -> None:
    value = json.loads(generate(StructuredOutputsParams(json=SCHEMA), seed, temperature=temperature))
    assert set(value) == {"name", "age", "tags"} and 0 <= value["age"] <= 130 and isinstance(value["age"], int)
    assert len(value["name"]) <= 5 and set(value["tags"]) <= {"a", "b"} and len(value["tags"]) <= 2


@pytest.mark.parametrize("seed", range(2))
def test_outputs_satisfy_a_regex_a_choice_and_grammars(seed: int) -> None:
    assert re.fullmatch(r"[0-9]{3}-[a-c]{2,4}", generate(StructuredOutputsParams(regex=r"[0-9]{3}-[a-c]{2,4}"), seed))
    choices = ['say "yes"', "no\n", "vielleicht é #&~ \\"]
    assert generate(StructuredOutputsParams(choice=choices), seed) in choices
    lark = 'start: "(" (start | NUMBER) ")"\nNUMBER: /[0-9]{1,3}/'
    assert re.fullmatch(r"\(+[0-9]{1,3}\)+", generate(StructuredOutputsParams(grammar=lark), seed))
    gbnf = 'root ::= ("a" | "b") " " root | "."'
    assert re.fullmatch(r"([ab] )*\.", generate(StructuredOutputsParams(grammar=gbnf), seed))


def test_any_json_object_and_another_tokenizer() -> None:
    wanted = StructuredOutputsParams(json={"type": "object", "properties": {"é": {"const": "你好"}}, "required": ["é"],
                                           "additionalProperties": False})  # fmt: skip
    assert json.loads(generate(wanted, 0, byte_fallback())) == {"é": "你好"}
    sampler = Sampler(0, GRAMMARS)
    sequence = make_sequence(vocab=VOCAB, structured_outputs=StructuredOutputsParams(json_object=True))
    first = sampler.sample(torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)), [sequence]).token_ids[0]
    assert first is not None and BYTE_LEVEL.decode([first]).lstrip(" \t\r\n")[:1] in ("{", "")


def test_logprobs_are_those_of_the_model() -> None:
    sequence = make_sequence(vocab=VOCAB, structured_outputs=StructuredOutputsParams(choice=["a"]), logprobs=0)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    samples = Sampler(0, GRAMMARS).sample(logits, [sequence])
    (token,) = BYTE_LEVEL.encode("a")
    assert samples.token_ids == [token] and samples.logprobs[0] is not None
    assert samples.logprobs[0][token].logprob == pytest.approx(logits.log_softmax(-1)[0, token].item())


@pytest.mark.parametrize(
    "given",
    [{"json": SCHEMA}, {"regex": "[0-9]{3}-[a-c]{2,4}"}, {"choice": ["a", "ab é"]}],
    ids=["json", "regex", "choice"],
)
def test_one_token_is_allowed_where_it_is_among_all_that_are(given: dict[str, Any]) -> None:
    matcher, generator = GRAMMARS.matcher(StructuredOutputsParams(**given)), torch.Generator().manual_seed(2)
    tokens: list[int] = []
    for _ in range(12):
        matcher.follow(tokens)
        allowed = matcher.allowed()
        others = [token for token in range(VOCAB) if token != EOS]
        assert [matcher.allows(token) for token in others] == allowed[others].tolist()
        assert allowed[EOS] or not matcher.allows(EOS)
        choices = allowed[others].nonzero()[0]
        if not len(choices):
            break
        tokens.append(others[choices[int(torch.randint(len(choices), (), generator=generator))]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_that_a_grammar_allows_is_taken(dtype: torch.dtype) -> None:
    """Whether or not it is the best of all, whether its logit is positive, and beside sequences without a grammar."""
    params = StructuredOutputsParams(json=SCHEMA)
    sampler, matcher = Sampler(0, GRAMMARS), GRAMMARS.matcher(params)
    sequence = make_sequence(vocab=VOCAB, structured_outputs=params, temperature=0.0)
    other = make_sequence(vocab=VOCAB, temperature=0.0)
    generator, was_best = torch.Generator().manual_seed(3), set()
    for turn in range(40):
        logits = (torch.randn(2, VOCAB, generator=generator) * 3 - turn % 2 * 20).to(dtype)
        matcher.follow(sequence.token_ids[sequence.num_prompt_tokens :])
        refused = ~torch.from_numpy(matcher.allowed()[:VOCAB])
        if turn % 3 == 0:
            logits[0, refused] = -40.0
        elif turn % 3 == 1:
            logits[0, refused.nonzero()[0]] = torch.nan
        best = int(logits[0].masked_fill(refused, -torch.inf).float().argmax())
        was_best.add(best == int(logits[0].float().argmax()))
        assert sampler.sample(logits, [sequence, other]).token_ids == [best, int(logits[1].float().argmax())]
        sequence.append(best)
        if sequence.finish_reason:
            break
    assert was_best == {True, False}


def test_a_logit_that_is_no_number_is_none_to_choose_by() -> None:
    sequence = make_sequence(vocab=VOCAB, structured_outputs=StructuredOutputsParams(choice=["a"]), temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, BYTE_LEVEL.encode("a")] = torch.nan
    assert Sampler(0, GRAMMARS).sample(logits, [sequence]).token_ids == [None]


def test_a_matcher_goes_back_where_tokens_are_taken_back() -> None:
    matcher = GRAMMARS.matcher(StructuredOutputsParams(choice=["ab", "ac"]))
    a, b, c = (BYTE_LEVEL.encode(letter)[0] for letter in "abc")
    matcher.follow([a])
    after_a = matcher.allowed().copy()
    matcher.follow([a, b])
    assert matcher.allowed()[EOS] and not matcher.allowed()[c]
    matcher.follow([a])
    assert (matcher.allowed() == after_a).all() and after_a[[b, c]].all()
    matcher.follow([a, c])
    assert matcher.allowed()[EOS]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodeploy.runtime.grammar.MAX_CACHED_GRAMMARS", 2)
    grammars = compiler()
    for letter in "abcd":
        grammars.matcher(StructuredOutputsParams(choice=[letter]))
    assert [source for _, source in grammars._kept] == ['["c"]', '["d"]']
    grammars.matcher(StructuredOutputsParams(choice=["c"]))
    grammars.matcher(StructuredOutputsParams(choice=["e"]))
    assert [source for _, source in grammars._kept] == ['["c"]', '["e"]']


def test_what_was_compiled_for_a_request_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others are compiled before the engine takes it; another model's compiler makes its own."""
    monkeypatch.setattr("autodeploy.runtime.grammar.MAX_CACHED_GRAMMARS", 1)
    grammars, other = compiler(), compiler(byte_fallback(), 300)
    params = StructuredOutputsParams(choice=["hello"])
    grammars.matcher(params)
    for letter in "abc":
        grammars.matcher(StructuredOutputsParams(choice=[letter]))
    monkeypatch.setattr(grammars, "_compile", None)
    begins = set(grammars.matcher(params).allowed().nonzero()[0])
    assert set(other.matcher(params).allowed().nonzero()[0]) != begins
    assert params == StructuredOutputsParams(choice=["hello"])


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + "{}" + "}" * depth


def chain(length: int, link: Any) -> dict[str, Any]:
    definitions = {f"d{at}": link(f"#/$defs/d{at + 1}") for at in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{length}": {"type": "string"}}}


def rules(length: int, rule: str) -> str:
    return "start: r0\n" + "".join(rule.format(at, at + 1) for at in range(length)) + f'r{length}: "a"'


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one"),
    ({"regex": "a", "json_object": True}, "exactly one"),
    ({"json": "{"}, "not valid JSON"),
    ({"json": "[1]"}, "must be a JSON object"),
    ({"json": {"type": "strin"}}, "json"),
    ({"json": {"enum": [float("nan")]}}, "not valid JSON"),
    ({"json": {"$ref": "#/$defs/none"}}, "json"),
    ({"json": {"$ref": "https://example.com/schema"}}, "json"),
    ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "nothing satisfies it"),
    ({"json": nested(30_000)}, "128|bytes|JSON"),
    ({"json": nested(200)}, "nests|JSON"),
    ({"json": {"enum": [f"v{at}" for at in range(100_000)]}}, "bytes"),
    ({"json": {"type": "string", "pattern": "("}}, "json"),
    ({"json": chain(2000, lambda target: {"$ref": target})}, "references"),
    ({"json": {"allOf": [{"anyOf": [{"properties": {f"k{a}{b}": {"type": "string"}}} for b in range(9)]}
                         for a in range(12)]}}, "too large"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": ""}, "not a text"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, "nests"),
    ({"regex": "a" * 20_000}, "bytes"),
    ({"regex": r"(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": "a\ud800"}, "Unicode"),
    ({"choice": []}, "1 to 4096"),
    ({"choice": [""]}, "none of them empty"),
    ({"choice": "ab"}, "list of strings"),
    ({"choice": [str(at) for at in range(5000)]}, "1 to 4096"),
    ({"grammar": "start: other"}, "grammar"),
    ({"grammar": "root ::= " + "(" * 90 + '"a"'}, "grammar"),
    ({"grammar": rules(5000, "r{0}: r{1}\n")}, "lines or rules"),
    ({"grammar": "start: start"}, "nothing satisfies it|cannot be compiled"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(at) for at in range(len(REFUSED))])
def test_hostile_and_wrong_ones_are_refused(given: dict[str, Any], message: str) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        GRAMMARS.matcher(StructuredOutputsParams(**given))
    assert caught.value.parameter == "structured_outputs" and len(str(caught.value)) < 1000
    assert "backtrace" not in str(caught.value) and time.thread_time() - began < 10


HARD: list[dict[str, Any]] = [
    {"regex": "(a|aa)+$"},
    {"regex": "((a+)+)+b"},
    {"regex": "(.*a){20}"},
    {"regex": "(([a-z]{0,1000}){0,1000}){0,1000}"},
    {"regex": ".*a.{20}b"},
    {"json": {"type": "string", "pattern": "^(([a-z]{1,200}){1,200}){1,200}$"}},
    {"json": {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}},
    {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10_000, "maxItems": 100_000}},
    {"json": nested(40)},
    {"json": {"anyOf": [{"properties": {f"k{a}_{b}": {"type": "string"} for b in range(9)}} for a in range(90)]}},
    {"json": chain(500, lambda target: {"$ref": target})},
    {"json": chain(1000, lambda target: {"type": "object", "properties": {"a": {"$ref": target}}, "required": ["a"]})},
    {"grammar": rules(400, "r{0}: r{1}\n")},
    {"grammar": rules(400, 'r{0}: "b" (r{1} | "c")\n')},
    {"grammar": rules(400, 'r{0}: "b"? (r{1} "c"*)+ | "d"\n')},
    {"grammar": "start: R0\n" + "".join(f'R{at}: "b" (R{at + 1} | "c")\n' for at in range(400)) + 'R400: "a"'},
    {"grammar": 'start: (start start start | "a")* start?'},
]


@pytest.mark.parametrize("given", HARD, ids=[str(at) for at in range(len(HARD))])
def test_hard_ones_serve_or_are_refused_but_do_not_hang_or_crash(given: dict[str, Any]) -> None:
    """CPU time of the process, since compilation has a thread of its own; what neighbours do is not in it."""
    began = time.process_time()
    try:
        matcher = GRAMMARS.matcher(StructuredOutputsParams(**given))
    except InvalidRequestError:
        pass
    else:
        generator = torch.Generator().manual_seed(0)
        tokens: list[int] = []
        for _ in range(12):
            matcher.follow(tokens)
            allowed = matcher.allowed().nonzero()[0]
            if not len(allowed):
                assert matcher.problem or tokens
                break
            tokens.append(int(allowed[int(torch.randint(len(allowed), (), generator=generator))]))
            if tokens[-1] == EOS:
                break
    assert time.process_time() - began < 20


def test_hard_ones_take_little_memory() -> None:
    """All of them at once, in a process of their own, whose peak tells what they took; and one whose places grow with
    its output, until the limits end it.
    """
    code = """
import random, resource, sys
from tests.runtime.test_grammar import GRAMMARS, HARD
from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.structured_outputs import StructuredOutputsParams

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

GRAMMARS.matcher(StructuredOutputsParams(choice=["a"]))
before, kept, choose = peak_bytes(), [], random.Random(0)
for given in HARD:
    for _ in range(3):
        try:
            matcher = GRAMMARS.matcher(StructuredOutputsParams(**given))
        except InvalidRequestError:
            break
        kept.append(matcher)
        tokens = []
        while len(tokens) < 20 and len(allowed := matcher.allowed().nonzero()[0]):
            tokens.append(int(choose.choice(allowed)))
            matcher.follow(tokens)
growing, tokens = GRAMMARS.matcher(StructuredOutputsParams(regex="(?s:.*)[a-m](?s:.{900})[n-z]")), []
while len(tokens) < 6000 and len(allowed := growing.allowed().nonzero()[0]):
    tokens.append(int(choose.choice(allowed[:256])))
    growing.follow(tokens)
print(len(kept), peak_bytes() - before, growing.problem)
"""
    root = Path(__file__).parents[2]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(Path(autodeploy.__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_kept, num_bytes, problem = done.stdout.strip().split(" ", 2)
    assert int(num_kept) > 30 and int(num_bytes) < 100 * 2**20 and "too many states" in problem


def test_contradictions_are_refused() -> None:
    guided = StructuredOutputsParams(json_object=True)
    for more in ({"ignore_eos": True}, {"min_tokens": 3}):
        with pytest.raises(InvalidRequestError, match="ends where its grammar does"):
            SamplingParams(structured_outputs=guided, **more)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        Sampler().constraints.check(SamplingParams(structured_outputs=guided))
