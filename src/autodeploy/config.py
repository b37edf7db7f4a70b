"""Options: what a user may set, one frozen dataclass per component, and the flat keyword arguments that fill them.

`LLM(...)`, the command line and a YAML file all speak the same flat names; `parse_options` sorts them into the three
dataclasses below and refuses a name it does not know. `"auto"` appears here only: `build` and the engine resolve it
into facts that are logged and stored with results.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autodeploy.errors import ConfigError

COMPILE_BACKENDS = ("auto", "torch-simple", "replay", "torch-compile", "torch-cudagraph", "torch-opt")
INDUCTOR_BACKENDS = ("torch-compile", "torch-opt")
"""Backends that put the graph, or regions of it, through Inductor."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
INTEGERS = ("int8", "int4")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
QUANTIZATIONS = (None, *INTEGERS, "fp8", "fp8_per_block", "nvfp4")
RUNTIMES = ("engine", "demollm")
MAX_SPECULATIVE_TOKENS = 64
HEAD_METHODS = ("eagle", "mtp")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how its files are read.

    Attributes:
        tokenizer: folder or hub id of the tokenizer; default: the model's own.
        revision: branch, tag or commit of a hub model.
        dtype: dtype of weights and activations; `auto` takes the checkpoint's (bfloat16 for GGUF files).
        trust_remote_code: run Python code that ships inside the checkpoint. Never without being asked.
        max_model_len: longest context in tokens (prompt and output); default: what the model was made for.
        model_kwargs: overrides for the model's Hugging Face config, e.g. `{"num_hidden_layers": 2}`.
        skip_tokenizer_init: token ids in, token ids out; no tokenizer is loaded.
        load_format: `auto` reads the checkpoint's weights; `dummy` fills random weights of the right shapes.
    """

    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_model_len: int | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    skip_tokenizer_init: bool = False
    load_format: str = "auto"


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """How the model is turned into a program.

    Attributes:
        device: `auto` takes CUDA where there is one, else the CPU.
        compile_backend: `torch-simple` runs the transformed graph as it is; `replay` does, and repeats steps of few
            tokens without Python between their kernels; `torch-compile` puts it through Inductor; `torch-cudagraph`
            repeats steps of few tokens as CUDA graphs, `torch-opt` does with regions that Inductor compiled. `auto` is
            `torch-cudagraph` on CUDA, `replay` on a CPU with native kernels.
        cudagraph_capture_sizes: numbers of tokens that CUDA graphs are captured for; batches are padded to the next.
            Default: 1, 2, 4 and multiples of 8 up to `max_num_seqs` for batches of one token per sequence, and a dozen
            sizes up to 512 for others.
        attn_backend: provider preferred for attention kernels; `auto` takes the first that supports the case.
        quantization: weights of products are rounded while they are read, to whole numbers (`int8`, `int4`) or to
            floating point of 8 bits (`fp8`, `fp8_per_block`) or 4 (`nvfp4`); default: as `dtype` says.
        quantization_group_size: for `int8` and `int4`, inputs of a weight that share a scale, a multiple of 32;
            default: a row for `int8`, 32 for `int4`.
        kv_cache_dtype: `fp8` (`fp8_e4m3`) or `fp8_e5m2` keeps keys and values in 8-bit floating point, without scales;
            `auto` in the model's dtype.
        batch_invariant: a request's tokens and log-probabilities have the same bits whatever runs beside it, however
            its prompt is cut, and whatever of it was cached; slower. A model for which that cannot be kept is refused.
        transforms: overrides by transform name, e.g. `{"fuse_qkv": {"enabled": False}}`.
        strict: fail when a transform leaves a site it expected to rewrite.
        check_isolation: pack two sequences and compare with each alone, once after loading.
        graph_cache: keep the lowered graph of a Hugging Face config, so that a second start need not capture it again.
        weight_cache: keep quantised weights beside that graph, so that a second start need not quantise them again.
        instant_on: serve with the model's own code while a first start builds the graph, where that can be done.
    """

    device: str = "auto"
    compile_backend: str = "auto"
    cudagraph_capture_sizes: list[int] | None = None
    attn_backend: str = "auto"
    quantization: str | None = None
    quantization_group_size: int | None = None
    kv_cache_dtype: str = "auto"
    batch_invariant: bool = False
    transforms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strict: bool = False
    check_isolation: bool = True
    graph_cache: bool = True
    weight_cache: bool = True
    instant_on: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How requests are scheduled and how much memory their states may take.

    Attributes:
        runtime: `engine` (continuous batching) or `demollm` (one request at a time, the readable reference).
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens in one step, prefill and decode together.
        page_size: tokens per page of paged state.
        kv_cache_memory_bytes: memory for all states; default: `memory_fraction` of what is free after loading.
        memory_fraction: share of the free memory that states may take when no byte count is given.
        max_queued_requests: requests waiting before new ones are refused.
        enable_prefix_caching: share the states of prefixes that requests have in common instead of computing them anew.
        speculative_config: draft tokens that one step verifies together, see `SpeculativeOptions`; default: none.
        async_scheduling: schedule and launch the next step before the tokens of the last are read; the tokens stay the
            same. Default: on CUDA, where the device would wait for the host otherwise.
        seed: seed of requests that bring none.
    """

    runtime: str = "engine"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    page_size: int = 32
    kv_cache_memory_bytes: int | None = None
    memory_fraction: float = 0.5
    max_queued_requests: int = 1024
    enable_prefix_caching: bool = True
    speculative_config: Mapping[str, Any] | None = None
    async_scheduling: bool | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SpeculativeOptions:
    """Who drafts tokens, and how many. The keys of `speculative_config`, spelled as in vLLM.

    Attributes:
        method: `ngram` (what followed the same tokens earlier in the sequence), `draft_model`, or a head that reads the
            model's hidden states: `eagle` or `mtp`. With `model` given, `draft_model` is the default.
        num_speculative_tokens: tokens drafted per step and sequence, at most.
        prompt_lookup_max, prompt_lookup_min: for `ngram`, how many of the latest tokens must have occurred before: the
            longest match counts, of at most and at least so many tokens.
        model: for `draft_model`, any model with the same vocabulary: a folder, file, hub id or `nn.Module`. For `eagle`
            and `mtp` the head: a checkpoint folder, hub id or `nn.Module`; `mtp` without it takes the one that was
            saved with the model.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    model: Any = None

    @property
    def uses_head(self) -> bool:
        """Whether a head drafts that belongs to the model's program."""
        return self.method in HEAD_METHODS

    @staticmethod
    def of(values: Mapping[str, Any] | None) -> "SpeculativeOptions | None":
        """Raises ConfigError for an unknown key or a bad value."""
        if values is None:
            return None
        name = "speculative_config"
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} must map names to values, e.g. {{'method': 'ngram'}}; got {values!r}")
        known = [f.name for f in dataclasses.fields(SpeculativeOptions)]
        if unknown := sorted(map(str, values.keys() - set(known))):
            raise ConfigError(f"{name} has the unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
        given = dict(values)
        if given.get("model") is not None:
            given.setdefault("method", "draft_model")
        longest = given.get("prompt_lookup_max")
        if isinstance(longest, int):
            given.setdefault("prompt_lookup_min", min(longest, SpeculativeOptions.prompt_lookup_min))
        options = SpeculativeOptions(**given)
        options._check(name)
        return options

    def _check(self, name: str) -> None:
        if self.method == "eagle3":
            raise ConfigError(
                f"{name}['method'] is 'eagle3', whose heads read the hidden states of three layers, which is not "
                "supported; use 'eagle', 'mtp', 'draft_model' or 'ngram'"
            )
        _one_of(f"{name}['method']", self.method, ("ngram", "draft_model", *HEAD_METHODS))
        for key in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            _at_least_one(f"{name}[{key!r}]", getattr(self, key))
        if self.num_speculative_tokens > MAX_SPECULATIVE_TOKENS:
            raise ConfigError(f"{name}['num_speculative_tokens'] must be at most {MAX_SPECULATIVE_TOKENS}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"{name}['prompt_lookup_min'] must be at most prompt_lookup_max, {self.prompt_lookup_max}"
            )
        if self.model is None and self.method in ("draft_model", "eagle"):
            raise ConfigError(f"{name} must name a model for the method {self.method!r}")
        if self.model is not None and self.method == "ngram":
            raise ConfigError(f"{name} names a model, which the method 'ngram' does without; leave one of them out")


ALIASES: dict[str, str] = {
    "max_batch_size": "max_num_seqs",
    "max_num_tokens": "max_num_batched_tokens",
    "max_seq_len": "max_model_len",
    "block_size": "page_size",
    "tokens_per_block": "page_size",
    "gpu_memory_utilization": "memory_fraction",
    "hf_overrides": "model_kwargs",
}
"""Names that users of vLLM and TensorRT-LLM know, and what they are called here."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one deployment."""

    model: ModelOptions = field(default_factory=ModelOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)


def parse_options(values: Mapping[str, Any]) -> Options:
    """Sort flat keyword arguments into `Options`.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a name given twice through an alias, or a bad value.
    """
    parts: dict[str, type[Any]] = {"model": ModelOptions, "compile": CompileOptions, "engine": EngineOptions}
    owner = {f.name: part for part, cls in parts.items() for f in dataclasses.fields(cls)}
    sorted_values: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name not in owner:
            nearest = difflib.get_close_matches(given, [*owner, *ALIASES], n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"unknown option {given!r}{hint} Known options: {', '.join(sorted(owner))}")
        if name in sorted_values[owner[name]]:
            raise ConfigError(f"option {name!r} is given twice ({given!r} is another name for it)")
        sorted_values[owner[name]][name] = value
    options = Options(
        model=ModelOptions(**sorted_values["model"]),
        compile=CompileOptions(**sorted_values["compile"]),
        engine=EngineOptions(**sorted_values["engine"]),
    )
    check_options(options)
    return options


def check_options(options: Options) -> None:
    """Raises ConfigError when a value is outside its range."""
    _one_of("dtype", options.model.dtype, DTYPES)
    _one_of("load_format", options.model.load_format, ("auto", "dummy"))
    _one_of("compile_backend", options.compile.compile_backend, COMPILE_BACKENDS)
    _one_of("quantization", options.compile.quantization, QUANTIZATIONS)
    _one_of("kv_cache_dtype", options.compile.kv_cache_dtype, KV_CACHE_DTYPES)
    sizes = options.compile.cudagraph_capture_sizes
    if sizes is not None:
        if not isinstance(sizes, list | tuple) or not sizes:
            raise ConfigError(
                f"cudagraph_capture_sizes must be a list of whole numbers such as [1, 2, 4]; got {sizes!r}"
            )
        for size in sizes:
            _at_least_one("each of cudagraph_capture_sizes", size)
        if options.compile.compile_backend not in ("auto", "torch-cudagraph", "torch-opt"):
            raise ConfigError(
                f"cudagraph_capture_sizes is given, and compile_backend={options.compile.compile_backend!r} captures "
                "no graphs; leave it out, or use compile_backend='torch-cudagraph'"
            )
    group_size = options.compile.quantization_group_size
    if group_size is not None and (group_size not in range(32, 2**31, 32) or isinstance(group_size, bool)):
        raise ConfigError(f"quantization_group_size must be a multiple of 32, got {group_size!r}")
    if group_size is not None and (given := options.compile.quantization) not in INTEGERS:
        found = "without quantization" if given is None else f"with quantization={given!r}, which has sizes of its own"
        raise ConfigError(f"quantization_group_size is given {found}; choose int8 or int4 too")
    if options.compile.batch_invariant:
        # Steps that are repeated, or compiled by Inductor, may round exponentials and sums in another way than others.
        for name, kept in (("compile_backend", ("auto", "torch-simple")), ("attn_backend", ("auto",))):
            if (value := getattr(options.compile, name)) not in kept:
                raise ConfigError(f"{name}={value!r} cannot keep batch_invariant; leave one of them out")
    _one_of("runtime", options.engine.runtime, RUNTIMES)
    for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_queued_requests"):
        _at_least_one(name, getattr(options.engine, name))
    _one_of("async_scheduling", options.engine.async_scheduling, (None, True, False))
    for name, value in (
        ("max_model_len", options.model.max_model_len),
        ("kv_cache_memory_bytes", options.engine.kv_cache_memory_bytes),
    ):
        if value is not None:
            _at_least_one(name, value)
    if not 0.0 < options.engine.memory_fraction <= 1.0:
        raise ConfigError(f"memory_fraction must be in (0, 1], got {options.engine.memory_fraction!r}")
    if SpeculativeOptions.of(options.engine.speculative_config) is not None and options.engine.runtime == "demollm":
        raise ConfigError("runtime=demollm does not speculate; leave speculative_config out, or use runtime=engine")


def _one_of(name: str, value: object, allowed: tuple[str | bool | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _at_least_one(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
