"""RoundKVCache: which states it takes, half the bytes, numbers near unrounded ones, and the same in every schedule."""

import pytest
import torch

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.errors import ConfigError
from autodeploy.ops.attention import read_pages, write_entries
from autodeploy.ops.state import PagedState, SlotState
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.states import StateBytes
from autodeploy.transforms.cache.round_kv_cache import RoundKVCache
from tests import tiny
from tests.engines import generated
from tests.graphs import attention_model, captured, causal_sdpa

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def _program(name: str, dtype: torch.dtype = torch.float32, **options: object) -> Program:
    return build((tiny.TINY | tiny.HYBRID)[name]().to(dtype), parse_options({"device": "cpu", **options}))


@pytest.mark.parametrize(
    ("name", "dtype", "worst"),
    [("gemma3_text", "fp8", 0.05), ("gemma3_text", "fp8_e5m2", 0.2), ("kimi_linear", "fp8_e4m3", 0.05)],
)
def test_logits_are_near_those_of_whole_keys(name: str, dtype: str, worst: float) -> None:
    exact, rounded = _program(name), _program(name, kv_cache_dtype=dtype)
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=5)]
    expected = run_packed(exact, rows)
    error = (run_packed(rounded, rows) - expected).norm() / expected.norm()
    assert 1e-4 < float(error) < worst
    assert rounded.report.facts["isolation"] == "passed"


def test_graphs_without_pages_are_refused_by_name() -> None:
    graph = captured(attention_model(causal_sdpa))  # nothing is cached yet
    with pytest.raises(ConfigError, match="fp8_e5m2"):
        RoundKVCache(enabled=True, dtype="fp8_e5m2").run(graph)


def test_a_token_takes_half_the_bytes() -> None:
    exact, rounded = (_program("llama", torch.bfloat16, kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    ((_, before),), ((_, after),) = (StateBytes.of(p.states, 32).page_bytes.items() for p in (exact, rounded))
    assert (before, after) == (2 * after, after) and {spec.dtype for spec in rounded.states} == {torch.float8_e4m3fn}
    engines = [
        Engine(program, EngineOptions(kv_cache_memory_bytes=200_000, page_size=4, max_num_seqs=64), max_model_len=96)
        for program in (exact, rounded)
    ]
    pages = [engine.plan.groups[0].num_pages for engine in engines]
    assert 1.95 * pages[0] < pages[1] < 2.05 * pages[0]


def test_states_in_slots_and_rows_for_others_stay_as_they_are() -> None:
    program = _program("bamba", kv_cache_dtype="fp8")
    paged = {spec.dtype for spec in program.states if isinstance(spec, PagedState)}
    slots = {spec.dtype for spec in program.states if isinstance(spec, SlotState)}
    assert paged == {torch.float8_e4m3fn} and slots == {torch.float32}


def test_a_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ConfigError, match="pages of keys and values, which this model has not"):
        build(model, parse_options({"device": "cpu", "kv_cache_dtype": "fp8"}))


def test_the_same_tokens_however_prompts_are_cut_preempted_or_found() -> None:
    program = _program("llama", kv_cache_dtype="fp8")
    shared = tiny.prompts(1, seed=3, shortest=20, longest=21)[0]
    prompts = [shared + prompt for prompt in tiny.prompts(6, seed=4, longest=20)]
    alone = [
        generated(Engine(program, EngineOptions(enable_prefix_caching=False), max_model_len=96), [prompt], GREEDY)[0]
        for prompt in prompts
    ]
    token_bytes = sum(spec.bytes_per_token for spec in program.states if isinstance(spec, PagedState))
    room = 150 * token_bytes  # for one longest sequence and a short one
    options = EngineOptions(max_num_batched_tokens=24, page_size=4, kv_cache_memory_bytes=room)
    engine = Engine(program, options, max_model_len=96)
    assert generated(engine, prompts, GREEDY) == alone
    assert engine.stats().num_preemptions > 0
    assert generated(engine, prompts, GREEDY) == alone  # what is left of their pages is found again


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_too_large_becomes_the_largest_number(dtype: torch.dtype) -> None:
    cache = torch.zeros(2, 2, 3, dtype=dtype)
    write_entries(cache, torch.tensor([3]), torch.tensor([[1e6, -1e6, float("nan")]]))
    largest = torch.finfo(dtype).max
    kept = read_pages(cache, torch.tensor([1]), torch.float32)
    torch.testing.assert_close(kept[1], torch.tensor([largest, -largest, float("nan")]), equal_nan=True)
    assert kept[0].eq(0).all() and read_pages(cache, torch.tensor([0]), torch.float32).eq(0).all()


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, fp8, fp8_e4m3, fp8_e5m2; got 'int8'"):
        parse_options({"kv_cache_dtype": "int8"})
