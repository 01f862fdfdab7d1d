"""`work/mykv.py`: the learner's functions, the course's for those not written yet, and the cache around them.

The file is a whole cache after every lesson. A function that passes its check takes the place of the
one that was imported from `kvlab.course.minikv`. Whatever else the learner writes into the file stays.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

from kvlab.course import minikv
from kvlab.course.work import work_dir
from kvlab.errors import InputError

PARTS = tuple(
    name
    for name, value in vars(minikv).items()
    if isinstance(value, FunctionType) and value.__module__ == minikv.__name__
)
"""The functions that the cache is built from, in the order of the course."""
CLASSES = (
    "MiniTable",
    "MiniLayer",
    "MiniPool",
    "MiniRedis",
    "MiniTiers",
    "MiniPlanner",
    "MiniCache",
    "MiniConnector",
    "MiniScheduler",
    "MiniReport",
)

HEADER = '''"""My distributed KV cache. The course writes each answer here once it passes; change what you like.

All of it at work: python -m kvlab demo --impl work/mykv.py
How far I am:      python -m kvlab progress
kvlab's contracts: python -m kvlab contracts --impl work/mykv.py
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import math
import random
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import redis
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from kvlab.cache import CacheStats, KVCache
from kvlab.core.keys import KVSpec, token_bytes
from kvlab.engine.batch import Row, forward
from kvlab.engine.pages import PagePool
from kvlab.errors import InputError
from kvlab.model import Llama
from kvlab.stores import Health, Store, StoreStats, Value
from kvlab.stores.base import check_buffers, check_keys, check_values, deliver, joined
from kvlab.stores.redis.reasons import reason_of
'''
GIVEN = "# --- The pool and the cache around these functions, given by the course ---"
NOT_YET = "# Not written yet: these are the course's."
IMPORT = f"from {minikv.__name__} import "


def keep(name: str, source: str, right: Callable[[Callable[..., object]], bool]) -> str:
    """Put a function's source into the learner's `mykv.py`, replacing an older one.

    Args:
        right: whether the function is right as it is in the file, without the notebook around it.

    Returns:
        A line that says in which file it was kept, or why not. If it replaces another function of this name, the
        file as it was stays beside it, with ".before" after its name.

    Raises:
        OSError, ValueError, SyntaxError: the file cannot be read, parsed or written.
    """
    path = work_dir() / "mykv.py"
    before = path.read_text("utf-8") if path.exists() else HEADER
    after = with_function(before, name, textwrap.dedent(source))
    if problem := _problem(after, name, right):
        return f"not kept in mykv.py: {problem}"
    path.parent.mkdir(parents=True, exist_ok=True)
    replaces = before != after and _has(before, name)
    if replaces:
        _write(old := path.with_name(f"{path.name}.before"), before)
    _write(path, after)
    return f"kept in {_from_here(path)}" + (f"; the file as it was is {_from_here(old)}" if replaces else "")


def with_function(module: str, name: str, source: str) -> str:
    """The text of a `mykv.py` with this function in it, and whole."""
    module = _with_classes(module)
    lines = module.rstrip().splitlines()
    found = {node.name: node for node in _parsed(module) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if name in found:
        begin, end = _first_line(found[name]), found[name].end_lineno
        lines[begin:end] = source.rstrip().splitlines()
    else:
        at = _first_line(found[CLASSES[0]]) if CLASSES[0] in found else len(lines)
        at -= at > 0 and lines[at - 1] == GIVEN
        lines[at:at] = [*source.rstrip().splitlines(), "", ""]
    return _with_imports("\n".join(lines) + "\n")


def load_answers(path: str | Path) -> ModuleType:
    """Import a learner's `mykv.py`. It is their own code, so it is simply run.

    Raises:
        InputError: there is no such file, or it does not import.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location("mykv", path)
    if not path.is_file():
        raise InputError(f"expected a Python file with answers, found none at {path}")
    if spec is None or spec.loader is None:
        raise InputError(f"expected a Python file with answers, its name ending in .py, got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever their code raises is theirs to mend
        raise InputError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module


def find(path: str | Path) -> Path:
    """A learner's file by the path they gave: from here, or in their work folder.

    Raises:
        InputError: it is at neither place.
    """
    places = [Path(path), work_dir() / Path(path).name, Path(minikv.__file__).parents[2] / "work" / Path(path).name]
    for place in places:
        if place.is_file():
            return place
    looked = " or ".join(dict.fromkeys(map(str, places[:2])))
    hint = "; the course writes mykv.py when the first exercise passes"
    raise InputError(f"expected a Python file with answers, found none at {looked}{hint}")


def own_function(module: ModuleType, name: str) -> FunctionType | None:
    """A function that a learner's file defines. One that it imports from the course is not theirs: None."""
    function = getattr(module, name, None)
    return function if isinstance(function, FunctionType) and function.__module__ == module.__name__ else None


def own_parts(module: str) -> list[str]:
    """The parts of the cache, functions and classes, that this text of a `mykv.py` has and the course has not so."""
    of_course = {ast.dump(node) for node in _parsed(inspect.getsource(minikv))}
    return [
        node.name
        for node in _parsed(module)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in (*PARTS, *CLASSES)
        and ast.dump(node) not in of_course
    ]


def whole(module: str) -> str:
    """The text of a `mykv.py` with all that a whole cache needs."""
    return _with_imports(_with_classes(module))


def _with_classes(module: str) -> str:
    """With the cache around the functions, where the file has none yet."""
    have = {node.name for node in _parsed(module) if isinstance(node, ast.ClassDef)}
    missing = [inspect.getsource(getattr(minikv, name)).rstrip() for name in CLASSES if name not in have]
    if missing and GIVEN not in module:
        missing[0] = f"{GIVEN}\n{missing[0]}"
    return "\n\n\n".join([module.rstrip(), *missing]) + "\n"


def _with_imports(module: str) -> str:
    """With an import for each function that the cache needs and that the learner has not written."""
    body = _parsed(module)
    lines = module.splitlines()
    for node in reversed(body):
        if isinstance(node, ast.ImportFrom) and node.module == minikv.__name__:
            begin = node.lineno - 1
            begin -= begin > 0 and lines[begin - 1] == NOT_YET
            del lines[begin : node.end_lineno]
            while begin < len(lines) and not lines[begin]:
                del lines[begin]
    own = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    missing = [name for name in PARTS if name not in own]
    body = _parsed("\n".join(lines))
    at = max([node.end_lineno or 0 for node in body if isinstance(node, ast.Import | ast.ImportFrom)], default=0)
    rest = lines[at:]
    while rest and not rest[0]:
        del rest[0]
    names = textwrap.fill(", ".join(missing), 100, initial_indent="    ", subsequent_indent="    ")
    imports = [NOT_YET, f"{IMPORT}(\n{names},\n)"] if missing else []
    return "\n".join([*lines[:at], "", *imports, "", "", *rest]) + "\n"


def _has(module: str, name: str) -> bool:
    """Whether a text of a `mykv.py` defines this function."""
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in _parsed(module))


def _from_here(path: Path) -> Path:
    """The path relative to the current folder if the file is in it, else the whole path."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def _parsed(module: str) -> list[ast.stmt]:
    return ast.parse(module, "mykv.py").body


def _problem(module: str, name: str, right: Callable[[Callable[..., object]], bool]) -> str:
    """Why the function in this text of a `mykv.py` is not right without the notebook around it; "" if it is."""
    missing = _undefined(module, name)
    leans = f"the function uses {missing or 'something'} from this notebook; put it inside the function"
    with tempfile.TemporaryDirectory(prefix="kvlab-") as folder:
        trial = Path(folder) / "mykv.py"
        trial.write_text(module, "utf-8")
        try:
            return "" if right(getattr(load_answers(trial), name)) else leans
        except InputError as error:
            if not isinstance(error.__cause__, NameError):
                return str(error).replace(str(trial), "the file")
            old = f"the file does not fit this version of the course ({error.__cause__}): move it away, check again"
            return leans if missing else old


def _undefined(module: str, name: str) -> str:
    """The names that a function uses and that nothing in the text of its module defines, separated by commas."""
    body = _parsed(module)
    function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    known = set(dir(builtins))
    for node in [*body, *ast.walk(function)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    for inner in ast.walk(ast.Module([*body], [])):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            known.add(inner.id)
        elif isinstance(inner, ast.arg):
            known.add(inner.arg)
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return ", ".join(sorted(used - known))


def _write(path: Path, text: str) -> None:
    """Replace a file at once: a crash leaves the old one."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, "utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
