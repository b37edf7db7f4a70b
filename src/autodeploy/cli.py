"""The command line: arguments go in, a thin call into the package is made, text comes out.

Every option of `autodeploy.config` is a flag of every command that builds a model (`cli_flags.py`). Answers go to
standard output, everything else to standard error.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from autodeploy import env
from autodeploy.cli_flags import (
    NO_FLAGS,
    NO_SERVER_FLAGS,
    NO_TEXTS,
    OWN_SAMPLING,
    ConfigFile,
    Flags,
    Listening,
    Sampling,
    SamplingFlags,
    Texts,
)
from autodeploy.config import ALIASES, Options, parse_options
from autodeploy.errors import AutoDeployError, ConfigError, InvalidRequestError
from autodeploy.start_up import without_collection

notes = Console(stderr=True, highlight=False)


def _show_version() -> str:
    import autodeploy

    return autodeploy.__version__


app = App(
    name="autodeploy",
    help="Deploy an off-the-shelf PyTorch language model: capture it, rewrite its graph, serve its tokens.",
    version=_show_version,
)
bench = App(name="bench", help="Measure a deployed model, beside what the machine can do at most.")
app.command(bench)


@app.command
def generate(
    model: str,
    *prompts: str,
    config: ConfigFile = None,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="")] = False,
    sampling: Sampling = OWN_SAMPLING,
    flags: Flags = NO_FLAGS,
) -> None:
    """Continue prompts; the text streams to standard output.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        prompts: texts to continue; without any, standard input is one prompt.
        config: YAML file with options by the same names; flags go before it.
        quiet: no progress and no build report.
    """
    texts = list(prompts) or [_read_standard_input()]
    with _loaded(model, _option_values(flags, config), quiet) as llm:
        params = _sampling_params(llm, sampling)
        for text in texts:
            asyncio.run(_stream(llm, text, params))


@app.command
def chat(
    model: str,
    *,
    system: str | None = None,
    config: ConfigFile = None,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="")] = False,
    sampling: Sampling = OWN_SAMPLING,
    flags: Flags = NO_FLAGS,
) -> None:
    """Talk with a model; an empty line, Ctrl-D or Ctrl-C ends it. Piped standard input is one message per line.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        system: what the model is told before the conversation.
        config: YAML file with options by the same names; flags go before it.
        quiet: no progress and no build report.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    with _loaded(model, _option_values(flags, config), quiet) as llm:
        params = _sampling_params(llm, sampling)
        for line in _lines():
            messages.append({"role": "user", "content": line})
            prompt = {"prompt_token_ids": llm.apply_chat_template(messages)}
            messages.append({"role": "assistant", "content": asyncio.run(_stream(llm, prompt, params))})


@app.command
def serve(
    model: str,
    *,
    config: ConfigFile = None,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="")] = False,
    listening: Listening = NO_SERVER_FLAGS,
    flags: Flags = NO_FLAGS,
) -> None:
    """Serve a model with an OpenAI-style HTTP interface, until a signal ends it.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        config: YAML file with options by the same names, those of the server included; flags go before it.
        quiet: no progress and no build report.
    """
    try:
        with without_collection():
            from autodeploy.server.app import create_app
            from autodeploy.server.options import NAMES, parse_server_options
            from autodeploy.server.run import make_server
            from autodeploy.server.served import ServedModel
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name!r}: pip install 'autodeploy[serve]'") from error

    values = _option_values(flags, config)
    own = {name: values.pop(name) for name in NAMES & values.keys()} | _given(listening)
    key = env.api_key()
    options = parse_server_options({"api_key": key, **own} if key is not None else own)
    with _loaded(model, values, quiet) as llm:
        served = ServedModel(
            engine=llm.async_engine,
            names=options.served_model_name or [model],
            tokenizer=llm.tokenizer,
            max_model_len=llm.max_model_len,
            constraints=llm.constraints,
            default_sampling=llm.generation_defaults,
        )
        with without_collection():
            server = make_server(create_app(served, version=_show_version(), options=options), served, options)
        server.run()


@app.command
def inspect(
    model: str,
    *,
    graph: str | None = None,
    output: Path | None = None,
    rates: tuple[float, float] | None = None,
    config: ConfigFile = None,
    flags: Flags = NO_FLAGS,
) -> None:
    """Show what a build makes of a model, as a page and in short; only the model's config is read, not its weights.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        graph: graph level to print as text (captured, canonical, cached, lowered) instead.
        output: file for the page; default: the model's name and `.html`, here.
        rates: GB/s and GFLOP/s of the machine that times are told for; default: measured on this one.
        config: YAML file with options by the same names; flags go before it.
    """
    options = _options(flags, config)
    if graph is not None:
        from autodeploy.debug.inspect import graph_text

        print(graph_text(_local_model(model), graph, options))
        return
    with _progress(quiet=False) as report_stage:
        report_stage("loading libraries")
        from autodeploy.debug.inspect import inspect_model
        from autodeploy.debug.page import machine_limits, write_page

        inspection = inspect_model(_local_model(model), options, progress=report_stage)
        report_stage("measuring the machine" if rates is None else "writing the page")
        path = output or Path(f"{inspection.report.facts['model']}.html")
        write_page(inspection, machine_limits(inspection, rates), path)
    print_report(inspection.report, Console(highlight=False))
    print(path)


@app.command
def check(
    model: str,
    *,
    full: Annotated[bool, Parameter(negative="")] = False,
    texts: Texts = NO_TEXTS,
    json_path: Annotated[Path | None, Parameter(name=["--json", "--json-path"])] = None,
    config: ConfigFile = None,
    flags: Flags = NO_FLAGS,
) -> int:
    """Compare a build with the model's own code; exit status 1 if something is wrong.

    Every step, on a tiny clone, for which only the config is read. With --full: the real weights, on a few prompts.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        full: build the model as it would be served, and compare tokens and logits with transformers' in float32.
        json_path: file for everything that was found.
        config: YAML file with options by the same names; flags go before it.
    """
    options = _options(flags, config)
    given = texts.values()
    if given and not full:
        raise ConfigError(f"{', '.join(given)}: a check of a tiny clone has no texts; add --full")
    with _progress(quiet=False) as report_step:
        report_step("loading libraries")
        from autodeploy.debug.check import check as check_model
        from autodeploy.debug.check_table import print_check
        from autodeploy.debug.full_table import print_full_check
        from autodeploy.debug.report_json import report_json

        found = Console(highlight=False)
        report: Any
        if full:
            report = check_model(_local_model(model), options, progress=report_step, full=True, **given)
        else:
            report = check_model(_local_model(model), options, progress=report_step)
    (print_full_check if full else print_check)(report, found)
    if json_path is not None:
        json_path.write_text(report_json(report), encoding="utf-8")
    return 0 if report.passed else 1


@bench.command
def latency(
    model: str,
    *,
    input_len: int = 128,
    output_len: int = 64,
    repeats: int = 5,
    json_path: Annotated[Path | None, Parameter(name=["--json", "--json-path"])] = None,
    profile: Path | None = None,
    config: ConfigFile = None,
    flags: Flags = NO_FLAGS,
) -> None:
    """One request at a time: time to first token, time per output token, share of the machine's limits.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        input_len: tokens per prompt.
        output_len: tokens generated per request.
        repeats: measured requests.
        json_path: file for the results and everything they depend on.
        profile: folder for a trace of prefill and decode steps, and a table of their ops against the machine's limits.
        config: YAML file with options by the same names; flags go before it.
    """
    from autodeploy.bench import latency as bench_latency

    bench_latency.run(
        _local_model(model),
        _options(flags, config),
        input_len=input_len,
        output_len=output_len,
        repeats=repeats,
        json_path=json_path,
        profile=profile,
    )


@bench.command
def throughput(
    model: str,
    *,
    num_prompts: int = 32,
    input_len: tuple[int, int] = (32, 512),
    output_len: tuple[int, int] = (64, 128),
    json_path: Annotated[Path | None, Parameter(name=["--json", "--json-path"])] = None,
    profile: Path | None = None,
    config: ConfigFile = None,
    flags: Flags = NO_FLAGS,
) -> None:
    """Many requests at once: requests and tokens per second.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        num_prompts: requests, all waiting from the start.
        input_len: least and most tokens per prompt.
        output_len: least and most tokens generated per request.
        json_path: file for the results and everything they depend on.
        profile: folder for a trace of prefill and decode steps, and a table of their ops against the machine's limits.
        config: YAML file with options by the same names; flags go before it.
    """
    from autodeploy.bench import throughput as bench_throughput

    bench_throughput.run(
        _local_model(model),
        _options(flags, config),
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        json_path=json_path,
        profile=profile,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. One clear line for an error of our own, unless debugging."""
    try:
        status = app(arguments, result_action="return_value")
    except AutoDeployError as error:
        if env.is_debugging():
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0


def print_report(report: Any, console: Console) -> None:
    """A `BuildReport` as tables: seconds per stage, sites per transform, kernels per op, and what was refused."""
    stages = Table("stage", "seconds", title="Build", title_justify="left")
    for stage, seconds in report.seconds.items():
        stages.add_row(stage, f"{seconds:.2f}")
    columns = ("stage", "transform", "expected", "found", "rewritten", "refused")
    rewrites = Table(*columns, title="Rewrites", title_justify="left")
    for entry in report.transforms:
        expected = "" if entry.expected is None else str(entry.expected)
        counts = (entry.found, entry.rewritten, len(entry.refused))
        rewrites.add_row(entry.stage, entry.name, expected, *map(str, counts))
    kernels = Table("op", "provider", "nodes", title="Kernels", title_justify="left")
    for op, providers in report.kernels.items():
        for provider, nodes in providers.items():
            kernels.add_row(op, provider, str(nodes))
    for table in (stages, rewrites, kernels):
        if table.row_count:
            console.print(table)
    for entry in report.transforms:
        for reason in entry.refused:
            console.print(f"refused by {entry.name}: {reason}", markup=False)
    for op, reasons in report.kernel_reasons.items():
        for reason in reasons:
            console.print(f"{op}: passed over {reason}", markup=False)
    facts = {name: value for name, value in report.facts.items() if value not in ([], None, "")}
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)


@contextmanager
def _loaded(model: str, values: dict[str, Any], quiet: bool) -> Iterator[Any]:
    parse_options(values)  # a typing error should not wait for torch
    with _progress(quiet) as report_stage:
        report_stage("loading libraries")
        from autodeploy.llm import LLM

        llm = LLM(_local_model(model), progress=report_stage, **values)
    with llm:
        if not quiet:
            print_report(llm.report, notes)
        yield llm


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Yields a function that shows which stage is running: a spinner on a terminal, else one line per stage."""
    if quiet:
        yield lambda stage: None
    elif notes.is_terminal:
        with notes.status("starting") as status:
            yield status.update
    else:
        yield lambda stage: notes.print(stage, markup=False)


def _local_model(model: str) -> str:
    """A model that comes as a Python package may be named by its short name."""
    from autodeploy.packaged_models import model_path

    return model_path(model)


def _options(flags: Any, config: Path | None) -> Options:
    return parse_options(_option_values(flags, config))


def _option_values(flags: Any, config: Path | None) -> dict[str, Any]:
    """Flat options: those of the YAML file, overridden by flags that were given."""
    read = {} if config is None else {name.replace("-", "_"): value for name, value in _read_yaml(config).items()}
    from_file = {ALIASES.get(name, name): value for name, value in read.items()}
    return {**from_file, **_given(flags)}


def _given(flags: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(flags).items() if value is not None}


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]  # types-PyYAML is not worth a dependency

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read options from {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{path} must hold options as `name: value` lines, got {type(values).__name__}")
    return values


def _sampling_params(llm: Any, sampling: SamplingFlags) -> Any:
    from autodeploy.runtime.request import SamplingParams

    return SamplingParams(**{**llm.generation_defaults, **sampling.values()})


async def _stream(llm: Any, prompt: Any, params: Any) -> str:
    """Print an answer as it comes; returns it."""
    shown = ""
    async for output in llm.generate_async(prompt, params, streaming=True):
        text = output.outputs[0].text
        sys.stdout.write(_printable(text[len(shown) :]))
        sys.stdout.flush()
        shown = text
    sys.stdout.write("\n")
    return shown


def _printable(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text) if sys.stdout.isatty() else text


def _lines() -> Iterator[str]:
    """What the user says: typed at a prompt, or piped in."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            notes.print("> ", end="")
        line = sys.stdin.readline()
        if not line or (interactive and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _read_standard_input() -> str:
    if sys.stdin.isatty():
        raise InvalidRequestError("no prompt given; write one after the model, or pipe it in")
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise InvalidRequestError("standard input is empty; give a prompt")
    return text
