"""The surface and the rules of the package: documented, typed, layered, and nothing that runs what it reads."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvlab

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvlab"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    "errors",
    "core",
    "model",
    "testbed",
    "stores",
    "cache",
    "engine",
    "serve",
    "connectors",
    "lab",
    "course",
    "cli",
    "__main__",
)
MAY_PRINT = ("cli.py", "lab/demo.py", "course/")  # their readers are people; pyproject.toml says the same to ruff
HEAVY = ("matplotlib", "IPython", "ipywidgets", "fakeredis", "transformers", "seaborn", "pandas", "ray")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


every_file = pytest.mark.parametrize("file", FILES, ids=name_of)


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def is_public(name: str) -> bool:
    return not name.startswith("_")


def public_parts(body: list[ast.stmt], where: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions of a module, and public methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and is_public(node.name):
            yield f"{where}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_parts(node.body, f"{where}.{node.name}")


def signatures(body: list[ast.stmt], where: str) -> Iterator[tuple[str, Function]]:
    """Every function and method outside of functions, private ones and `__init__` too."""
    for node in body:
        if isinstance(node, Function):
            yield f"{where}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from signatures(node.body, f"{where}.{node.name}")


# --- documented and typed -----------------------------------------------------------------------
@every_file
def test_every_public_part_says_what_it_is(file: Path) -> None:
    tree = tree_of(file)
    silent = [name for name, node in public_parts(tree.body, file.stem) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), "the module has no docstring"
    assert silent == []


@every_file
def test_every_signature_is_fully_annotated(file: Path) -> None:
    missing = []
    for name, node in signatures(tree_of(file).body, file.stem):
        a = node.args
        bare = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x and not x.annotation]
        missing += [f"{name}: {arg}" for arg in bare if arg not in ("self", "cls")]
        missing += [f"{name}: return"] if node.returns is None else []
    assert missing == []


def test_there_is_something_to_check() -> None:
    names = {name_of(file) for file in FILES}
    assert {"__init__.py", "core/keys.py", "stores/redis/store.py", "cache/distributed.py"} <= names
    assert sum(1 for file in FILES for _ in public_parts(tree_of(file).body, "")) > 80


@pytest.mark.parametrize("package", ["", "model", "core", "stores", "cache", "engine"])
def test_what_a_package_exports_exists_and_is_sorted(package: str) -> None:
    module = __import__(f"kvlab.{package}".rstrip("."), fromlist=["x"])
    names = getattr(module, "__all__", [])
    assert all(hasattr(module, name) for name in names)
    assert len(set(names)) == len(names)
    public = {n for n, v in vars(module).items() if is_public(n) and getattr(v, "__module__", "").startswith("kvlab")}
    assert public <= set(names)


def test_every_error_is_a_kvlab_error() -> None:
    errors = [getattr(kvlab, name) for name in kvlab.__all__ if name.endswith("Error")]
    assert len(errors) == 4
    assert all(issubclass(error, kvlab.KVLabError) for error in errors)
    assert issubclass(kvlab.ConfigError, ValueError) and issubclass(kvlab.InputError, ValueError)


# --- layers -------------------------------------------------------------------------------------
def imported(tree: ast.Module, file: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer of a dotted name; None outside of kvlab and for `kvlab` itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "kvlab" and len(parts) > 1 and parts[1] in LAYERS else None


@every_file
def test_imports_point_downwards(file: Path) -> None:
    own = name_of(file).split("/")[0].removesuffix(".py")
    if own == "__init__":  # the front door shows what is inside
        return
    assert own in LAYERS, f"kvlab/{own} has no place in the order of layers"
    upwards = [
        name
        for name in imported(tree_of(file), file)
        if (layer := layer_of(name)) and LAYERS.index(layer) > LAYERS.index(own)
    ]
    assert upwards == []


@every_file
def test_nothing_imports_the_front_door(file: Path) -> None:
    """`from kvlab import x` inside kvlab would make a circle."""
    if name_of(file) == "__init__.py" or name_of(file).startswith(("course/", "cli", "__main__")):
        return
    direct = [n for n in imported(tree_of(file), file) if n.startswith("kvlab") and layer_of(n) is None]
    assert direct == []


# --- what the package never does ----------------------------------------------------------------
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "hash", "compile", "__import__"}


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@every_file
def test_nothing_unpickles_evaluates_or_hashes_by_chance(file: Path) -> None:
    tree = tree_of(file)
    found = [name for name in imported(tree, file) if name.split(".")[0] in FORBIDDEN_MODULES]
    found += [c.func.id for c in calls(tree) if isinstance(c.func, ast.Name) and c.func.id in FORBIDDEN_CALLS]
    found += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.load"]
    found += [ast.unparse(c) for c in calls(tree) if any(k.arg in ("allow_pickle", "shell") for k in c.keywords)]
    found += [name for name in imported(tree, file) if name == "torch.load"]
    assert found == []


@every_file
def test_only_what_people_read_prints(file: Path) -> None:
    if name_of(file).startswith(MAY_PRINT):
        return
    prints = [c.lineno for c in calls(tree_of(file)) if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert prints == []


def test_the_checks_above_find_what_they_look_for() -> None:
    bad = ast.parse(
        "import pickle.x\nfrom torch import load\nhash(1)\ntorch.load(f)\nprint(1)\nnp.load(f, allow_pickle=1)"
    )
    assert [n.split(".")[0] for n in imported(bad, Path())] == ["pickle", "torch"]
    assert [c.func.id for c in calls(bad) if isinstance(c.func, ast.Name)] == ["hash", "print"]
    assert layer_of("kvlab.stores.redis") == "stores" and layer_of("kvlab.load_model") is None


def test_importing_kvlab_imports_nothing_heavy() -> None:
    program = f"import sys, kvlab\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_importing_kvlab_reads_and_writes_nothing_of_the_users(tmp_path: Path) -> None:
    program = "import kvlab, pathlib; print(sorted(p.name for p in pathlib.Path.home().rglob('*')))"
    env = {"HOME": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- examples -----------------------------------------------------------------------------------
def test_the_examples_of_the_readme_run(tmp_path: Path) -> None:
    """The Python blocks as one program; each `# prints …` says what its line prints, up to a colon."""
    text = (ROOT / "README.md").read_text("utf-8")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    expected = re.findall(r"# prints ([^:\n]*)", program)
    assert len(expected) == program.count("print(") >= 8
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [line.strip() for line in expected]
