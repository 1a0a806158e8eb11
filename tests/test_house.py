"""The rules of the house: what may import what, what is documented, what is one and the same."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import deepdem
from deepdem.accessor import DeepDEMArrayAccessor, DeepDEMDatasetAccessor

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deepdem"

#: The flow. A module imports from those before it only.
ROOMS = (
    "layers",
    "provenance",
    "windows",
    "blocks",
    "vertical",
    "level",
    "_memory",
    "mosaic",
    "sources/_lattice",
    "sources/_landscape",
    "sources/_stereo",
    "sources/synthetic",
    "sources/raster",
    "sources/folder",
    "grid",
    "sources/_bytes",
    "sources/_las_crs",
    "sources/_clouds",
    "sources/_cells",
    "sources/_ground",
    "sources/_tiles",
    "sources/_collections",
    "sources/lidar",
    "terrain",
    "statistics",
    "clahe",
    "derive",
    "sources/_assets",
    "sources/stac",
    "scene",
    "runs",
    "store",
    "config",
    "sources/simulated",
    "chips",
    "splits",
    "regions",
    "sampling",
    "batches",
    "models",
    "convolution",
    "inference",
    "modelfile",
    "_worker",
    "predict",
    "recipes",
    "monitor",
    "data",
    "train",
    "legacy",
    "refine",
    "_run",
    "builder",
    "write",
    "cog",
    "fetch",
    "coregister",
    "evaluate",
    "plot",
    "summary",
    "report",
    "demo",
    "experiments",
    "accessor",
    "cli_fetch",
    "cli",
)
_FUNCTION_LINES, _MODULE_LINES = 60, 400


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def _modules() -> dict[str, Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {_room(path): path for path in files if path.name != "__init__.py"}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Yield line, module and imported names of each import of the package by itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if (node.module or "").split(".")[0] == "deepdem":
                yield node.lineno, str(node.module), [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "deepdem":
                    yield node.lineno, alias.name, []


def _imported_rooms(module: str, names: list[str]) -> set[str]:
    """Return the rooms that an import opens; "" is the package's front, its `__init__`."""
    room = "/".join(module.split(".")[1:])
    if room in ROOMS:
        return {room}
    inner = {f"{room}/{name}".lstrip("/") for name in names}
    return {name if name in ROOMS else room for name in inner} or {room}


def _everything() -> list[Path]:
    """Return the repository's text files that people write."""
    tops = ("deepdem", "tests", "tutorials", "ci", ".ci", ".github")
    files = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    text = {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".cfg", ".sh", ".txt", ""}
    hidden = {"__pycache__", ".ipynb_checkpoints", ".git"}  # in a worktree .git is a file
    return [f for f in files if f.suffix in text and not hidden & set(f.parts)]


# --- the flow ------------------------------------------------------------------------------------


def test_every_module_has_its_room() -> None:
    assert sorted(_modules()) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_the_flow(room: str) -> None:
    above = set(ROOMS[: ROOMS.index(room)])
    offences = []
    for line, module, names in _imports(_tree(_modules()[room])):
        for found in _imported_rooms(module, names):
            # The package's front is everybody's to reach in a shell; the version is a constant.
            front = found == "" and (room == "cli" or names == ["__version__"])
            if found not in above and not front:
                offences.append(f"{room}.py:{line} imports {module}")
    assert not offences


def test_only_the_front_imports_the_accessor() -> None:
    offences = [
        f"{room}:{line}"
        for room, path in _modules().items()
        for line, module, names in _imports(_tree(path))
        if "accessor" in _imported_rooms(module, names)
    ]
    assert not offences


def test_the_accessor_imports_other_rooms_inside_its_methods_only() -> None:
    tree = _tree(PACKAGE / "accessor.py")
    inside = [
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for line, *_ in _imports(node)
    ]
    assert inside
    assert [line for line, *_ in _imports(tree) if line not in inside] == []


def test_import_is_light_and_quick() -> None:
    heavy = ("torch", "distributed", "pytorch_lightning", "matplotlib")
    program = (
        "import json, sys, time; start = time.perf_counter(); import deepdem; "
        "seconds = time.perf_counter() - start; "
        f"print(json.dumps([seconds, [n for n in {heavy!r} if n in sys.modules]]))"
    )
    best = float("inf")
    for _ in range(3):  # a loaded machine is no reason to fail
        run = _python("-c", program)
        assert run.returncode == 0, run.stderr
        seconds, loaded = json.loads(run.stdout)
        assert loaded == []
        best = min(best, seconds)
        if best < 2:
            break
    assert best < 2


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  # our own words
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


# --- what is documented --------------------------------------------------------------------------


def _public() -> dict[str, Any]:
    """Return the public names, and the accessors' methods."""
    public = {n: getattr(deepdem, n) for n in deepdem.__all__ if n != "__version__"}
    for accessor in (DeepDEMDatasetAccessor, DeepDEMArrayAccessor):
        for name, member in vars(accessor).items():
            if not name.startswith("_"):
                public[f"{accessor.__name__}.{name}"] = member
    return public


def test_all_names_resolve() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", deepdem.__version__)
    assert set(deepdem.__all__) <= set(dir(deepdem))
    for name in deepdem.__all__:
        assert getattr(deepdem, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        deepdem.no_such_name  # noqa: B018


def test_docstrings_say_first_what_comes_back() -> None:
    silent = []
    for name, thing in _public().items():
        first = (inspect.getdoc(thing) or "").split("\n")[0]
        if inspect.isclass(thing):
            said = bool(first)
        elif inspect.signature(thing).return_annotation in (None, "None"):
            said = bool(first) and not first.startswith("Return")
        else:
            said = first.startswith("Return ")
        if not (said and first.endswith(".")):
            silent.append(f"{name}: {first!r}")
    assert not silent


def test_accessor_methods_are_one_liners() -> None:
    tree = _tree(PACKAGE / "accessor.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            body = [n for n in node.body[1:] if not isinstance(n, ast.ImportFrom)]
            assert len(body) <= 2, f"accessor.{node.name} is more than a one-liner"


# --- what is said twice is the same --------------------------------------------------------------


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```shell\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_readme_lists_the_modules_in_the_order_of_the_flow() -> None:
    (flow,) = re.findall(r"```text\n(.*?)```", _readme(), re.DOTALL)
    rows = [line.split(maxsplit=1) for line in flow.splitlines() if line and line[0] != "#"]
    assert [row[0] for row in rows] == [f"{room}.py" for room in ROOMS]
    assert all(len(row) == 2 for row in rows)


def test_readme_ci_and_workflow_run_one_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    command = script[-1]
    assert script[0].startswith("#!")
    assert "set -euo pipefail" in script
    assert "pytest" in command
    assert command in _shell_lines(_readme())
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    classifiers = [c.rsplit(" ", 1)[-1] for c in _project()["classifiers"] if ":: 3." in c]
    assert job["strategy"]["matrix"]["python-version"] == classifiers


def test_readme_commands_are_one_line_with_all_their_set_up() -> None:
    lines = _shell_lines(_readme())
    assert len(lines) == 2
    assert all(line.startswith("python3 -m venv .venv && ") for line in lines)
    assert lines[0].endswith("deepdem demo")


def test_the_files_that_the_readme_names_are_there() -> None:
    named = set(re.findall(r"(?:tutorials|ci|\.ci)/[\w./-]+\.\w+", _readme()))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def _ranges(requirements: list[str]) -> dict[str, str]:
    """Return the range of each name; an extra such as dask[distributed] is a name of its own."""
    ranges = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?(.*)", requirement)
        assert match, requirement
        name, extras, span = match[1].lower(), (match[2] or "").split(","), match[3]
        ranges[name] = span
        if name == "dask" and "distributed" in extras:
            ranges["distributed"] = span
    return ranges


def test_the_conda_environment_mirrors_the_project() -> None:
    project = _project()
    wanted = _ranges([*project["dependencies"], *project["optional-dependencies"]["test"]])
    wanted["pytorch"] = wanted.pop("torch")
    wanted["python"] = project["requires-python"]
    environment = yaml.safe_load((ROOT / "ci/environment.yml").read_text(encoding="utf-8"))
    named = [d for d in environment["dependencies"] if d != "pip"]
    by_pip = [d for group in named if isinstance(group, dict) for d in group["pip"]]
    given = _ranges([*(d for d in named if isinstance(d, str)), *by_pip])
    assert given == wanted


# --- what must not be there ----------------------------------------------------------------------


def test_no_path_of_one_machine() -> None:
    # Spelled so that this file does not hold what it looks for.
    places = "|".join(("work", "home", "Users", "root", "mnt", "tmp/bash"))
    pattern = re.compile(rf"(?<![\w.:/~$}}-])/(?:{places})/|[A-Z]:\\\\?Users")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _everything()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def _dangers(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that can execute what a file holds."""
    unpicklers = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if unpicklers & {module.split(".")[0] for module in modules}:
                yield node.lineno
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            allows = any(
                k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords
            )
            unsafe = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}
            if call in unsafe or allows or call.endswith(".load_from_checkpoint"):
                yield node.lineno


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "legacy"])
def test_nothing_executes_what_a_file_holds(room: str) -> None:
    assert list(_dangers(_tree(_modules()[room]))) == []


def test_old_checkpoints_are_read_by_restricted_unpicklers_only() -> None:
    tree = _tree(_modules()["legacy"])
    uses = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    pickles = {use for use in uses if use.startswith("pickle.")}
    assert pickles == {"pickle.Unpickler", "pickle.UnpicklingError"}
    loads = [node for node in ast.walk(tree)
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]  # fmt: skip
    assert [{k.arg: ast.unparse(k.value) for k in load.keywords}["weights_only"]
            for load in loads] == ["True"]  # fmt: skip
    subclass = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
                    and "pickle.Unpickler" in map(ast.unparse, node.bases))  # fmt: skip
    assert "find_class" in {n.name for n in subclass.body if isinstance(n, ast.FunctionDef)}


def test_dangers_are_seen() -> None:
    for line in ("import pickle", "from dill import loads", "eval(x)", "torch.load(f)",
                 "np.load(f, allow_pickle=True)", "Model.load_from_checkpoint(f)"):  # fmt: skip
        assert list(_dangers(ast.parse(line))) == [1]
    for line in ("net.eval()", "safetensors.torch.load(f)", "np.load(f)"):
        assert list(_dangers(ast.parse(line))) == []


# --- tools and sizes -----------------------------------------------------------------------------


def _code_lines(path: Path) -> set[int]:
    """Return the numbers of the lines that are neither blank nor comment nor docstring."""
    source = path.read_text(encoding="utf-8")
    idle = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER, tokenize.ENCODING}  # fmt: skip
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in idle:
            lines |= set(range(token.start[0], token.end[0] + 1))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def test_code_lines_are_counted_without_words(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        '"""Doc\nstring."""\n\n# why\ndef f(\n    x,\n):\n    """Doc."""\n    return x\n'
    )
    assert _code_lines(path) == {5, 6, 7, 9}


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_too_long(room: str) -> None:
    path = _modules()[room]
    lines = _code_lines(path)
    long = [f"{room}.py: {len(lines)} lines"] if len(lines) > _MODULE_LINES else []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef):
            own = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if own > _FUNCTION_LINES:
                long.append(f"{room}.{node.name}: {own} lines")
    assert not long


@pytest.mark.parametrize("arguments", ["check", "format --check"])
def test_ruff_passes(arguments: str) -> None:
    run = _python("-m", "ruff", *arguments.split(), ".")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_mypy_passes() -> None:
    run = _python("-m", "mypy")
    assert run.returncode == 0, run.stdout + run.stderr
