"""The house rules that a reviewer should not have to check: who imports whom, sizes, docstrings, names, patches."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "autodeploy"
MODULES = sorted(SOURCE.rglob("*.py"))

FILE_LINES = 500
KERNEL_FILE_LINES = 800
FUNCTION_LINES = 60
README_LINES = 200

# Part of the package -> the parts it may import, besides itself. The longest prefix of a module's name decides, so a
# line for `transforms.lower` overrules the one for `transforms`. A part that is missing here fails the test.
_BASE = ("errors", "env", "config", "cache_dir", "memory", "start_up", "threads")
_RUNTIME_OPS = ("ops.batch_inputs", "ops.state", "ops.sampling")
_RUNTIME = ("errors", "env", "config", "memory", "start_up", "threads", *_RUNTIME_OPS, "compile.program")
_COMPILER = (*_BASE, "graph", "ops", "checkpoint", "kernels", "models", "capture", "transforms", "compile")
_SERVING = (*_RUNTIME, "outputs", "graph.report")
_WHOLE = (*_COMPILER, "runtime", "server", "build", "outputs", "llm", "bench", "debug")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "env": (),
    "config": ("errors",),
    "memory": (),
    "start_up": (),
    "threads": (),
    "cache_dir": ("errors", "env", "config"),
    "ops": _BASE,
    "quantization": (*_BASE, "ops"),
    "kernels": (*_BASE, "ops"),
    "checkpoint": (*_BASE, "ops"),
    # A graph carries its weights as recipes; of reading them it knows nothing.
    "graph": (*_BASE, "ops", "checkpoint.recipe", "checkpoint.quantize"),
    "models": (*_BASE, "ops", "checkpoint"),
    "capture": (*_BASE, "graph", "ops", "checkpoint", "models"),
    "transforms": (*_BASE, "graph", "ops", "checkpoint"),
    "transforms.lower": (*_BASE, "graph", "ops", "checkpoint", "kernels"),
    "transforms.pipeline": ("transforms", *_BASE, "graph", "ops", "checkpoint", "kernels"),
    "compile": (*_BASE, "graph", "ops", "kernels"),
    "debug.packed_run": (*_BASE, "ops", "compile"),
    "debug.isolation": (*_BASE, "graph", "ops", "compile", "debug.packed_run"),
    "graph_cache": (*_BASE, "graph", "kernels", "models.locate"),
    "build": (*_COMPILER, "debug.isolation", "graph_cache"),
    "instant_on": (*_COMPILER, "build", "debug.isolation", "graph_cache"),
    "debug": (*_COMPILER, "build", "bench.machine"),
    # The runtime generates what is compared with transformers' own tokens.
    "debug.full_check": (*_COMPILER, "build", "debug", "runtime"),
    "debug.original": (*_COMPILER, "runtime.tokenizer"),
    "runtime": _RUNTIME,
    "outputs": (*_RUNTIME, "runtime"),
    "server": (*_SERVING, "runtime"),
    # The text layer: the one place where the compiler's half and the runtime's half are both known.
    "llm": (*_SERVING, "runtime", "instant_on", "models.locate"),
    "ray": (*_SERVING, "runtime", "server", "llm", "packaged_models"),
    "bench.machine": (),
    "bench": (*_SERVING, "runtime", "build", "models.resolve"),
    # A profile tells what a graph's calls cost, and runs them one by one.
    "bench.profile": (*_RUNTIME, "runtime", "build", "graph", "ops", "compile", "debug.costs", "bench"),
    "packaged_models": _BASE,
    "demo": (*_WHOLE, "packaged_models", "cli"),
    "cli_flags": ("errors", "config", "server.options"),
    "cli": (*_WHOLE, "packaged_models", "cli_flags"),
    "__main__": (*_WHOLE, "cli"),
    "": _WHOLE,  # autodeploy/__init__.py, the list of public names
}

# Files that may name a model family: models are looked up by name there, and nothing else depends on the name.
NAMES_FAMILIES = {"packaged_models.py"}
FAMILIES = re.compile(
    r"(llama|qwen|mistral|mixtral|gemma|deepseek|nemotron|falcon|granite|bamba|gpt_?2|gpt_?oss|phi_?[0-9]|olmo|cohere|"
    r"starcoder|smollm|jamba|zamba|glm_?[0-9]|bloom|opt_?125m)",
    re.IGNORECASE,
)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in MODULES:
        module = _module_name(path)
        part = _part_of(module)
        assert part is not None, f"{module} is in no part of the layering table; give it a line in MAY_IMPORT"
        for imported, line in _own_imports(path):
            allowed = any(_within(imported, prefix) for prefix in (*MAY_IMPORT[part], part) if prefix)
            if not allowed and not (part in ("", "cli", "__main__") and imported == ""):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part or 'the package'} must not import {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_layering_table_has_no_cycle() -> None:
    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        for prefix in MAY_IMPORT[start]:
            part = _part_of(prefix)
            if part is None or part in seen or part == start:
                continue
            if part == goal or reaches(part, goal, seen | {part}):
                return True
        return False

    # A line for a part of a part (`transforms.lower`) is judged with its own imports, not with its parent's.
    cycles = [part for part in MAY_IMPORT if "." not in part and reaches(part, part, {part})]
    assert not cycles, f"these parts may import themselves through others: {cycles}"


def test_modules_import_each_other_without_a_cycle() -> None:
    known = {_module_name(path): path for path in MODULES}
    graph = {
        module: {name for name, _ in _own_imports(path) if name in known and name != module}
        for module, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("name", ["runtime.scheduler", "runtime.pages", "runtime.prefix_cache"])
def test_scheduling_needs_no_torch(name: str) -> None:
    path = SOURCE / (name.replace(".", "/") + ".py")
    if not path.exists():
        pytest.skip(f"{name} is not written yet")
    imported = {root for node in ast.walk(_tree(path)) for root in _imported_roots(node)}
    assert not imported & {"torch", "transformers"}


def test_heavy_imports_wait_until_a_command_needs_them() -> None:
    """`autodeploy --help` answers at once: what it imports at module level imports no torch."""
    for name in ("cli.py", "__main__.py"):
        path = SOURCE / name
        if path.exists():
            top_level = {root for node in _tree(path).body for root in _imported_roots(node)}
            assert not top_level & {"torch", "transformers"}, f"{name} imports {top_level} before it knows the command"


def test_files_and_functions_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
        for path in MODULES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    _print_sizes(lines, functions)
    too_long = [
        f"{path.relative_to(ROOT)}: {count} lines, limit {limit}"
        for path, count in lines.items()
        if count > (limit := KERNEL_FILE_LINES if SOURCE / "kernels" in path.parents else FILE_LINES)
    ]
    too_long += [
        f"{name}: {count} lines, limit {FUNCTION_LINES}" for count, name in functions if count > FUNCTION_LINES
    ]
    assert not too_long, "\n".join(too_long)


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in MODULES if not ast.get_docstring(_tree(path))]
    assert not silent, f"no module docstring: {silent}"


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers", "helper"}
    found = [
        str(path.relative_to(ROOT)) for path in MODULES if drawers & set(path.relative_to(SOURCE).with_suffix("").parts)
    ]
    assert not found, f"name these after what they hold: {found}"


def test_no_code_for_one_model_family() -> None:
    found = []
    for path in MODULES:
        relative = path.relative_to(SOURCE)
        if relative.as_posix() in NAMES_FAMILIES or relative.parts[:2] == ("models", "patches"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := FAMILIES.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_every_patch_says_when_it_can_go() -> None:
    patches = [path for path in MODULES if path.parent == SOURCE / "models" / "patches" and path.stem != "__init__"]
    print(f"\npatches of transformers: {len(patches)}")
    for path in patches:
        docstring = ast.get_docstring(_tree(path)) or ""
        for heading in ("Why:", "Versions:", "Remove when:"):
            assert heading in docstring, f"{path.relative_to(ROOT)}: its docstring has no line '{heading}'"


def test_every_test_file_mirrors_a_module() -> None:
    """`tests/x/test_y.py` tests `autodeploy/x/y.py`, or enumerates a table (`test_every_*`), or stands at the top.

    `tests/benchmarks` mirrors the scripts in `benchmarks/`, and `tests/gpu` is the one folder by need and not by place:
    a GPU machine runs it from a bare checkout.
    """
    lost = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder, name = path.relative_to(ROOT / "tests").parent, path.stem.removeprefix("test_")
        if (
            folder not in (Path(), Path("gpu"), Path("benchmarks"))
            and not name.startswith("every_")
            and not (SOURCE / folder).is_dir()
        ):
            lost.append(f"tests/{folder}/{path.name}")
    assert not lost, f"no such folder in the package: {lost}"


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_every_script_has_a_main(folder: str) -> None:
    scripts = sorted((ROOT / folder).glob("*.py"))
    assert scripts, f"{folder}/ is empty"
    for path in scripts:
        tree = _tree(path)
        assert ast.get_docstring(tree), f"{folder}/{path.name} has no docstring"
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "main" in names, f"{folder}/{path.name} has no main()"
        assert any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body), (
            f"{folder}/{path.name} runs on import, or not at all: it lacks `if __name__ == '__main__'`"
        )


def test_the_readme_stays_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES, f"README.md has {len(lines)} lines; move detail to docs/"


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken, "\n".join(broken)


def test_every_option_is_on_the_configuration_page() -> None:
    from autodeploy import config

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    options = [f for part in (config.ModelOptions, config.CompileOptions, config.EngineOptions) for f in fields(part)]
    missing = [option.name for option in options if f"| `{option.name}` |" not in page]
    missing += [f"{alias} -> {name}" for alias, name in config.ALIASES.items() if f"`{alias}`" not in page]
    assert not missing, f"docs/configuration.md lacks {missing}"
    wrong = [
        option.name
        for option in options
        if isinstance(option.default, int | float | str)
        and not re.search(rf"\| `{option.name}` \| `?{re.escape(str(option.default))}`? \|", page)
    ]
    assert not wrong, f"docs/configuration.md has other defaults for {wrong}"


def test_the_tested_versions_are_within_the_declared_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    for requirement in map(Requirement, declared):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), (
                f"{requirement} leaves out the tested version"
            )
    untested = [r.name for r in map(Requirement, project["dependencies"]) if r.name not in pins]
    assert not untested, f"no tested version in constraints.txt: {untested}"


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module_name(path: Path) -> str:
    """`runtime.engine` for src/autodeploy/runtime/engine.py; `ops` for ops/__init__.py; "" for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _part_of(module: str) -> str | None:
    """The longest prefix of the module's name that has a line in the table."""
    candidates = [prefix for prefix in MAY_IMPORT if (prefix and _within(module, prefix)) or prefix == module]
    return max(candidates, key=len, default=None)


def _own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of this package that a file imports anywhere in it, with the line: `ops.state`, or "" for the package."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _within(alias.name, "autodeploy"):
                    yield alias.name.removeprefix("autodeploy").removeprefix("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: relative import"
            if node.module and _within(node.module, "autodeploy"):
                package = node.module.removeprefix("autodeploy").removeprefix(".")
                for alias in node.names:
                    name = f"{package}.{alias.name}".removeprefix(".")
                    yield (name if _is_module(name) else package), node.lineno


def _is_module(name: str) -> bool:
    path = SOURCE / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _imported_roots(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module.split(".")[0]


def _print_sizes(lines: dict[Path, int], functions: list[tuple[int, str]]) -> None:
    print(f"\n{len(lines)} files, {sum(lines.values())} lines; longest files and functions (`pytest -s` shows this):")
    for path, count in sorted(lines.items(), key=lambda item: -item[1])[:8]:
        print(f"  {count:4} {path.relative_to(ROOT)}")
    for count, name in sorted(functions, reverse=True)[:8]:
        print(f"  {count:4} {name}")
