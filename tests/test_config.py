"""Options: flat names sort into their components, unknown ones are refused with the nearest, values have ranges."""

from dataclasses import fields
from typing import Any

import pytest

from autodeploy.config import (
    ALIASES,
    CompileOptions,
    EngineOptions,
    ModelOptions,
    Options,
    SpeculativeOptions,
    parse_options,
)
from autodeploy.errors import ConfigError

COMPONENTS = (ModelOptions, CompileOptions, EngineOptions)


def test_nothing_given_is_all_defaults() -> None:
    assert parse_options({}) == Options()


def test_names_sort_into_their_components() -> None:
    options = parse_options({"dtype": "bfloat16", "strict": True, "max_num_seqs": 3})
    assert (options.model.dtype, options.compile.strict, options.engine.max_num_seqs) == ("bfloat16", True, 3)


def test_speculation_is_spelled_as_elsewhere_and_checked() -> None:
    given = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    assert parse_options({"speculative_config": given}).engine.speculative_config == given
    assert SpeculativeOptions.of(None) is None
    assert SpeculativeOptions.of({"prompt_lookup_max": 1}) == SpeculativeOptions(
        prompt_lookup_max=1, prompt_lookup_min=1
    )
    assert SpeculativeOptions.of({"model": "folder"}) == SpeculativeOptions(method="draft_model", model="folder")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metod": "ngram"}, "unknown key 'metod'"),
        ({"method": "medusa"}, "ngram, draft_model"),
        ({"method": "draft_model"}, "must name a model"),
        ({"method": "eagle"}, "must name a model"),
        ({"method": "eagle3", "model": "folder"}, "three layers"),
        ({"method": "ngram", "model": "folder"}, "does without"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 1000}, "at most 64"),
        ({"prompt_lookup_max": 2, "prompt_lookup_min": 3}, "prompt_lookup_min"),
        ("ngram", "must map names to values"),
    ],
)
def test_bad_speculation_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options({"speculative_config": config})


def test_the_naive_runtime_does_not_speculate() -> None:
    with pytest.raises(ConfigError, match="demollm does not speculate"):
        parse_options({"speculative_config": {}, "runtime": "demollm"})


def test_every_name_belongs_to_one_component_and_is_documented() -> None:
    names = [field.name for component in COMPONENTS for field in fields(component)]
    assert len(names) == len(set(names))
    for component in COMPONENTS:
        for field in fields(component):
            assert f"{field.name}:" in (component.__doc__ or ""), f"{component.__name__}.{field.name}"


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_names_that_users_of_other_engines_know(alias: str, name: str) -> None:
    value: Any = {"memory_fraction": 0.25, "model_kwargs": {"num_hidden_layers": 2}}.get(name, 7)
    assert parse_options({alias: value}) == parse_options({name: value})
    with pytest.raises(ConfigError, match="given twice"):
        parse_options({alias: value, name: value})


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("max_num_seq", "max_num_seqs"), ("compile_backends", "compile_backend"), ("tokeniser", "tokenizer")],
)
def test_an_unknown_name_is_refused_with_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown option '{given}'; did you mean '{nearest}'"):
        parse_options({given: 1})


def test_an_unknown_name_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'zzzzzz' Known options:.*check_isolation.*tokenizer"):
        parse_options({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float8"),
        ("load_format", "gguf"),
        ("compile_backend", "torch-fast"),
        ("runtime", "trt"),
        ("quantization", "int3"),
        ("quantization", True),
        ("quantization_group_size", 16),
        ("quantization_group_size", 48),
        ("max_num_seqs", 0),
        ("max_num_seqs", True),
        ("max_num_batched_tokens", 1.5),
        ("page_size", -1),
        ("max_model_len", 0),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.5),
        ("memory_fraction", float("nan")),
        ("kv_cache_memory_bytes", 0),
        ("kv_cache_memory_bytes", "4GB"),
    ],
)
def test_values_out_of_range_name_option_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_options({name: value})


@pytest.mark.parametrize(
    "options", [{"compile_backend": "torch-compile"}, {"compile_backend": "replay"}, {"attn_backend": "torch"}]
)
def test_what_cannot_keep_batch_invariance_is_refused_beside_it(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot keep batch_invariant"):
        parse_options({"batch_invariant": True, **options})
