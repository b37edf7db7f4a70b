"""The command line: flags come from the option dataclasses, errors are one line, answers go to standard output."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from autodeploy import cli, config
from autodeploy.cli_flags import NO_FLAGS, OPTION_PARTS, ModelFlags
from autodeploy.debug.agreement import Agreement
from autodeploy.debug.check_report import FAILED, PASSED, CheckReport, CheckRow
from autodeploy.debug.full_report import FullReport, PromptResult
from autodeploy.errors import ConfigError, ModelNotFoundError
from autodeploy.graph.report import BuildReport, TransformReport
from autodeploy.outputs import OutputCollector, RequestOutput
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.request import SamplingParams, TokenOutput
from tests.runtime.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
REPORT = BuildReport(
    transforms=[TransformReport(name="fuse_qkv", stage="fuse", found=3, rewritten=2, refused=("too wide",))],
    kernels={"rms_norm": {"torch": 5}},
    seconds={"capture": 1.25},
)


class FakeLLM:
    """Answers with the prompt's own text; keeps what it was made with."""

    made: ClassVar[list["FakeLLM"]] = []

    def __init__(self, model: str, *, progress: Any, **options: Any):
        self.model, self.options, self.report = model, options, REPORT
        self.generation_defaults = {"temperature": 0.5}
        self.seen: list[tuple[Any, SamplingParams]] = []
        progress("capturing the graph")
        FakeLLM.made.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def apply_chat_template(self, messages: list[Mapping[str, str]]) -> list[int]:
        return TOKENIZER.encode(" | ".join(f"{message['role']}: {message['content']}" for message in messages))

    async def generate_async(self, prompt: Any, params: SamplingParams, streaming: bool) -> Any:
        assert streaming
        self.seen.append((prompt, params))
        token_ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else TOKENIZER.encode(prompt)
        collector = OutputCollector("r", token_ids, params, TOKENIZER, lambda index: None)
        for position, token_id in enumerate(token_ids):
            reason = "length" if position == len(token_ids) - 1 else None
            collector.add(TokenOutput(request_id="r", index=0, token_ids=[token_id], finish_reason=reason))
            output: RequestOutput = collector.snapshot()
            yield output


@pytest.fixture(autouse=True)
def _fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLLM.made.clear()
    monkeypatch.setattr("autodeploy.llm.LLM", FakeLLM)
    monkeypatch.delenv("AUTODEPLOY_DEBUG", raising=False)


def run_cli(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:  # how the parser reports a bad command line
        return int(stop.code or 0)


def test_every_option_is_a_flag_with_its_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    assert run_cli("generate", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in OPTION_PARTS:
        for name in part.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text
    for alias in config.ALIASES:
        assert f"--{alias.replace('_', '-')}" in text
    assert "tokens per page of paged state. [default: 32]" in text
    assert "Never without being asked" in text


def test_help_is_instant_and_loads_no_torch() -> None:
    code = "import sys; from autodeploy.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10.0  # a quarter of a second on an idle machine
    for command in ("generate", "chat", "serve", "bench", "check", "inspect"):
        assert command in done.stdout


def test_generate_streams_the_answer_and_keeps_notes_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("generate", "some/model", "hello 😀", "again", "--max-tokens", "9") == 0
    captured = capsys.readouterr()
    assert captured.out == "hello 😀\nagain\n"
    assert "capturing the graph" in captured.err
    assert "fuse_qkv" in captured.err and "rms_norm" in captured.err and "1.25" in captured.err
    params = FakeLLM.made[0].seen[0][1]
    assert (params.max_tokens, params.temperature) == (9, 0.5)


def test_quiet_says_nothing_but_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("generate", "m", "hello", "-q", "--temperature", "0") == 0
    assert capsys.readouterr() == ("hello\n", "")
    assert FakeLLM.made[0].seen[0][1].temperature == 0


def test_prompt_from_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", open_text("piped text\n"))
    assert run_cli("generate", "m", "-q") == 0
    assert capsys.readouterr().out == "piped text\n"
    monkeypatch.setattr("sys.stdin", open_text(""))
    assert run_cli("generate", "m", "-q") == 1
    assert "standard input is empty" in capsys.readouterr().err


def open_text(text: str) -> Any:
    import io

    return io.StringIO(text)


def test_only_flags_that_were_given_become_options() -> None:
    run_cli("generate", "m", "x", "-q")
    assert FakeLLM.made[-1].options == {}
    run_cli(
        *("generate", "m", "x", "-q", "--max-batch-size", "3", "--no-check-isolation", "--page_size=64"),
        *(
            "--model-kwargs",
            '{"num_hidden_layers": 2, "tie": true}',
            "--transforms",
            '{"fuse_qkv": {"enabled": false}}',
            "--speculative-config",
            '{"method": "ngram"}',
        ),
    )
    assert FakeLLM.made[-1].options == {
        "max_num_seqs": 3,
        "check_isolation": False,
        "page_size": 64,
        "model_kwargs": {"num_hidden_layers": 2, "tie": True},
        "transforms": {"fuse_qkv": {"enabled": False}},
        "speculative_config": {"method": "ngram"},
    }


def test_flags_go_before_the_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("max_seq_len: 128\npage_size: 16\ntransforms: {fuse_qkv: {enabled: false}}\n")
    run_cli("generate", "m", "x", "-q", "--config", str(path), "--page-size", "8")
    expected = {"max_model_len": 128, "page_size": 8, "transforms": {"fuse_qkv": {"enabled": False}}}
    assert FakeLLM.made[-1].options == expected
    path.write_text("page_siz: 16\n")
    assert run_cli("generate", "m", "x", "-q", "--config", str(path)) == 1
    assert "did you mean 'page_size'" in capsys.readouterr().err
    path.write_text("- a\n")
    assert run_cli("generate", "m", "x", "-q", "--config", str(path)) == 1
    assert "must hold options" in capsys.readouterr().err
    assert run_cli("generate", "m", "x", "-q", "--config", str(tmp_path / "none.yaml")) == 1
    assert "cannot read options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "m", "x", "--max-num-seq", "3"), "Did you mean --max-num-seqs?"),
        (("generate", "m", "x", "--page-size", "many"), "--page-size"),
        (("generate", "m", "x", "--transforms", "{"), "--transforms"),
        (("generate", "m", "x", "--transforms", "[1]"), "expected a JSON object"),
        (("generate", "m", "x", "--dtype", "float3"), "dtype must be one of"),
        (("generate", "m", "x", "--max-tokens", "0"), "max_tokens"),
        (("generate",), "--model requires an argument"),
        (("trainn", "m"), "trainn"),
    ],
)
def test_bad_command_lines(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*arguments) != 0
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in captured.out + captured.err


def test_our_errors_are_one_line_unless_debugging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ModelNotFoundError("no such model: 'm'")

    monkeypatch.setattr("autodeploy.llm.LLM", refuse)
    assert run_cli("generate", "m", "x", "-q") == 1
    assert capsys.readouterr() == ("", "error: no such model: 'm'\n")
    monkeypatch.setenv("AUTODEPLOY_DEBUG", "1")
    with pytest.raises(ModelNotFoundError):
        run_cli("generate", "m", "x", "-q")


def test_chat_remembers_the_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", open_text("one\n\ntwo\n"))
    assert run_cli("chat", "m", "-q", "--system", "be brief") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "system: be brief | user: one"
    assert second == f"system: be brief | user: one | assistant: {first} | user: two"


def test_a_models_text_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2Jb\tc\nd\x9b"
    assert cli._printable(text) == text  # a pipe gets every byte
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert cli._printable(text) == "a[2Jb\tc\nd"


def test_serve_hands_the_model_to_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, Any] = {}

    def run(server: Any) -> None:
        served.update(app=server.config.app, host=server.config.host, port=server.config.port)

    monkeypatch.setattr("autodeploy.server.run.DrainingServer.run", run)
    monkeypatch.setattr("autodeploy.server.run.log_config", lambda log_format: None)
    monkeypatch.setattr(FakeLLM, "async_engine", _IdleEngine(), raising=False)
    monkeypatch.setattr(FakeLLM, "tokenizer", TOKENIZER, raising=False)
    monkeypatch.setattr(FakeLLM, "max_model_len", 77, raising=False)
    monkeypatch.setattr(FakeLLM, "constraints", Constraints(), raising=False)
    assert run_cli("serve", "m", "-q", "--port", "1234", "--served-model-name", "a", "--served-model-name", "b") == 0
    assert (served["host"], served["port"]) == ("127.0.0.1", 1234)
    from fastapi.testclient import TestClient

    models = TestClient(served["app"]).get("/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("a", 77), ("b", 77)]


def test_a_file_says_what_flags_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options of the server and of the model side by side; a flag goes before the file, the file before a variable."""
    given: list[tuple[Any, Any]] = []
    for name, value in (("async_engine", _IdleEngine()), ("tokenizer", None), ("max_model_len", 77)):
        monkeypatch.setattr(FakeLLM, name, value, raising=False)
    monkeypatch.setattr(FakeLLM, "constraints", Constraints(), raising=False)

    def make_server(app: Any, model: Any, options: Any) -> Any:
        given.append((options, FakeLLM.made[-1].options))
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr("autodeploy.server.run.make_server", make_server)
    monkeypatch.setenv("AUTODEPLOY_API_KEY", "from-the-environment")
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1234\nhost: 0.0.0.0\nserved-model-name: [a, b]\nmax-body-bytes: 99\nmax_num_seqs: 3\n")
    assert run_cli("serve", "m", "-q", "--config", str(file), "--port", "4321") == 0
    names = ("--served-model-name", "a", "--served-model-name", "b")
    flags = ("--port", "4321", "--host", "0.0.0.0", "--max-body-bytes", "99", "--max-num-seqs", "3")
    assert run_cli("serve", "m", "-q", *names, *flags) == 0
    assert given[0] == given[1]
    options, values = given[0]
    assert options.api_key == ("from-the-environment",) and options.port == 4321 and values == {"max_num_seqs": 3}
    file.write_text("prot: 1234\n")
    assert run_cli("serve", "m", "--config", str(file)) == 1


class _IdleEngine:
    is_healthy = True


def test_inspect_writes_a_page_or_prints_a_graph(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import autodeploy.debug.inspect
    import autodeploy.debug.page

    class Inspection:
        report = BuildReport(transforms=REPORT.transforms, facts={"model": "m", "device": "cpu", "dtype": "float32"})

    written: list[Any] = []
    monkeypatch.setattr(autodeploy.debug.inspect, "inspect_model", lambda *args, **kwargs: Inspection())
    monkeypatch.setattr(autodeploy.debug.page, "write_page", lambda *args: written.append(args))
    page = tmp_path / "page.html"
    assert run_cli("inspect", "m", "--output", str(page), "--rates", "50", "900") == 0
    ((_, limits, path),) = written
    assert (limits.memory_gb_per_second, limits.matmul_gflop_per_second, path) == (50, 900, page)
    printed = capsys.readouterr().out
    assert "fuse_qkv" in printed and printed.endswith(f"{page}\n")
    assert run_cli("inspect", "m", "--rates", "0", "900") == 1
    assert "both above 0" in capsys.readouterr().err

    calls: list[Any] = []
    monkeypatch.setattr(autodeploy.debug.inspect, "graph_text", lambda *args: calls.append(args) or "graph as text")
    assert run_cli("inspect", "m", "--graph", "cached", "--strict") == 0
    assert capsys.readouterr().out == "graph as text\n"
    ((model, level, options),) = calls
    assert (model, level, options.compile.strict) == ("m", "cached", True)


def test_bench_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import autodeploy.bench.latency
    import autodeploy.bench.throughput

    calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def record(model: Any, options: Any, **arguments: Any) -> None:
        calls.append((model, options, arguments))

    monkeypatch.setattr(autodeploy.bench.latency, "run", record)
    monkeypatch.setattr(autodeploy.bench.throughput, "run", record)
    path = tmp_path / "out.json"
    assert run_cli("bench", "latency", "m", "--repeats", "2", "--json", str(path), "--dtype", "float32") == 0
    folder = tmp_path / "profile"
    more = ("--num-prompts", "3", "--profile", str(folder))
    assert run_cli("bench", "throughput", "m", "--input-len", "1", "9", *more) == 0
    assert calls[0][0] == "m" and calls[0][1].model.dtype == "float32"
    assert calls[0][2] == {"input_len": 128, "output_len": 64, "repeats": 2, "json_path": path, "profile": None}
    lengths = {"input_len": (1, 9), "output_len": (64, 128)}
    assert calls[1][2] == {"num_prompts": 3, **lengths, "json_path": None, "profile": folder}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--version") == 0
    assert capsys.readouterr().out.strip()


def test_options_and_flags_have_the_same_names() -> None:
    """`ModelFlags` is made from the options; JSON text in, the same Options out."""
    assert cli._options(NO_FLAGS, None) == config.Options()
    with pytest.raises(ConfigError, match="memory_fraction"):
        cli._options(ModelFlags(memory_fraction=3.0), None)
    assert json.loads("{}") == dict(config.Options().model.model_kwargs)


def _full_report(kl: float) -> FullReport:
    run = Agreement(
        num_equal_tokens=2, first_margin=None, num_positions=4, num_same_choice=4, worst_margin=0.0, kl_mean=kl,
        kl_max=kl, largest_error=0.0, largest_logit=1.0,
    )  # fmt: skip
    result = PromptResult(prompt="p", num_prompt_tokens=3, token_ids=[1, 2], ours=run, transformers=None)
    return FullReport({"model": "m", "dtype": "float32"}, [result])


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_a_full_check_takes_texts_and_tells_by_its_status(
    kl: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def check(model: str, options: config.Options, **given: Any) -> FullReport:
        given.pop("progress")("this build: prompt 1 of 2")
        seen.update(given)
        return _full_report(kl)

    monkeypatch.setattr("autodeploy.debug.check.check", check)
    (tmp_path / "prompt.txt").write_text("from a file\n", encoding="utf-8")
    text, found = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("read me", encoding="utf-8")
    status = run_cli(
        *("check", "m", "--full", "--prompt", "one", "--prompt-file", str(tmp_path / "prompt.txt")),
        *("--max-tokens", "2", "--perplexity", str(text), "--json", str(found)),
    )
    assert status == int(kl > 0)
    assert seen == {
        "full": True,
        "prompts": ["one", "from a file\n"],
        "max_tokens": 2,
        "perplexity": ("text.txt", "read me"),
    }
    captured = capsys.readouterr()
    assert "prompt 1, 3 tokens: p" in captured.out and "prompt 1 of 2" in captured.err
    assert json.loads(found.read_text(encoding="utf-8"))["passed"] is (kl == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "one"), "add --full"),
        (("--full", "--prompt-file", "/no/such/file"), "cannot read a text from /no/such/file"),
    ],
)
def test_texts_that_a_check_cannot_use_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("check", "m", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verdict", [PASSED, FAILED])
def test_check_prints_its_table_and_tells_by_its_status(
    verdict: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def check(model: str, options: config.Options, progress: Any) -> CheckReport:
        progress("capture")
        seen.append((model, options.model.dtype, options.compile.compile_backend))
        return CheckReport([CheckRow(stage="fuse", name="fuse_qkv", verdict=verdict, note="why and where")])

    monkeypatch.setattr("autodeploy.debug.check.check", check)
    status = run_cli("check", "m", "--dtype", "bfloat16", "--compile-backend", "torch-compile")
    assert status == (0 if verdict == PASSED else 1)
    assert seen == [("m", "bfloat16", "torch-compile")]
    captured = capsys.readouterr()
    assert "fuse_qkv" in captured.out and verdict in captured.out and "why and where" in captured.out
    assert "capture" in captured.err
