"""Checks whether this machine is ready for the course. Each check prints a line, with a command that fixes a problem.

`python -m kvlab doctor` prints the lines. This command imports `kvlab` and therefore torch. If this
import fails, `python kvlab/course/doctor.py` prints the same lines: each check imports the packages
that it needs, so that the script starts with the standard library alone.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OK, MISSING, PROBLEM = "ok", "optional, missing", "problem"
CHECKOUT = Path(__file__).resolve().parents[2]
EXTRAS = {"course": "the notebooks", "hf": "transformers models", "secure": "encrypted records", "test": "the tests"}


@dataclass(frozen=True)
class Check:
    """Result of one check. `status` is "ok", "optional, missing" or "problem"; `fix` is a command or empty."""

    name: str
    status: str
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<18} {self.name:<15} {self.detail}" + (f"; to fix it: {self.fix}" if self.fix else "")


def checks() -> list[Check]:
    """Run all checks. An exception in a check becomes the problem of this check and is never raised."""
    alone = _is_alone()
    jupyter = {} if alone else {"Jupyter kernel": _kernel, "widgets": _widgets}
    return [
        _guarded("Python", _python),
        _guarded("packages", _packages),
        *(_guarded(name, look) for name, look in jupyter.items()),
        _guarded("model", _model),
        _guarded("Redis", _redis),
        _guarded("GPU", _gpu),
        *(_guarded(f"extra {name}", partial(_extra, name)) for name in EXTRAS if alone or name != "course"),
    ]


def _is_checkout() -> bool:
    return (CHECKOUT / "pyproject.toml").is_file()


def _is_alone() -> bool:
    """Whether the package was installed without the course: not from a checkout, and no notebook can run."""
    return not _is_checkout() and _version("ipykernel") is None


def run(out: Callable[[str], object] = print) -> int:
    """Print the results of `checks`, one per line; return the exit status: 1 if there is a problem, else 0."""
    found = checks()
    for check in found:
        out(str(check))
    problems = sum(check.status == PROBLEM for check in found)
    out(f"problems: {problems}" if problems else "ready")
    return 1 if problems else 0


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # the reader needs a line, not a traceback
        said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        whole = f"-e {_near(CHECKOUT, '[course]')}" if _is_checkout() else "'kvlab[course]'"
        return Check(name, PROBLEM, said.splitlines()[0], f"{_pip()} {whole}")


def _near(path: Path, extra: str = "") -> str:
    """A path (with an extra) for a command line: relative if it and the current folder are in the checkout."""
    inside = path.is_relative_to(CHECKOUT) and Path.cwd().is_relative_to(CHECKOUT)
    return shlex.quote((os.path.relpath(path) if inside else str(path)) + extra)


def _python_here() -> str:
    return _near(Path(sys.executable))


def _pip() -> str:
    return f"{_python_here()} -m pip install"


def _python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    text = ".".join(map(str, version))
    if version >= (3, 11):
        return Check("Python", OK, text)
    return Check("Python", PROBLEM, f"expected 3.11 or newer, got {text}", "make lab PYTHON=/path/to/python3.11")


def _packages() -> Check:
    wanted = [*_requirements(""), *([] if _is_alone() else _requirements("course"))]
    unfit = list(_unfit(wanted))
    if not unfit:
        return Check("packages", OK, f"all {len(wanted)} are there in versions that fit")
    return Check("packages", PROBLEM, _described(unfit), f"{_pip()} {_arguments(unfit)}")


def _extra(name: str) -> Check:
    unfit = list(_unfit(_requirements(name)))
    if not unfit:
        return Check(f"extra {name}", OK, f"{EXTRAS[name]} will run")
    return Check(f"extra {name}", MISSING, f"for {EXTRAS[name]}: {_described(unfit)}", f"{_pip()} {_arguments(unfit)}")


def _requirements(extra: str, package: str = "kvlab") -> list[Requirement]:
    """Requirements of the installed `package`: its own if `extra` is "", else only those that `extra` adds."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires(package) or ()]
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]
    return [r for r in here if ("extra ==" in str(r.marker)) == bool(extra)]


def _unfit(wanted: Iterable[Requirement]) -> Iterable[tuple[Requirement, str | None]]:
    """The requirements that are not met, each with the installed version (None: missing)."""
    for requirement in wanted:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield requirement, version


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _described(unfit: Iterable[tuple[Requirement, str | None]]) -> str:
    return ", ".join(f"{r.name} is missing" if v is None else f"{r.name} {v} is not {r.specifier}" for r, v in unfit)


def _arguments(unfit: Iterable[tuple[Requirement, str | None]]) -> str:
    return " ".join(shlex.quote(f"{r.name}{r.specifier}") for r, _ in unfit)


def _kernel() -> Check:
    """Check that the kernel is this environment's. A kernel of another environment may have the same name."""
    from jupyter_client.kernelspec import KernelSpecManager

    if _version("ipykernel") is None:
        return Check("Jupyter kernel", PROBLEM, "ipykernel is missing", f"{_pip()} ipykernel")
    program = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    if program.is_absolute() and program.parent.resolve() != Path(sys.executable).parent.resolve():
        fix = f"{_python_here()} -m ipykernel install --sys-prefix"
        return Check("Jupyter kernel", PROBLEM, f"python3 starts another environment: {program}", fix)
    return Check("Jupyter kernel", OK, "python3 starts this environment")


def _widgets() -> Check:
    """Check ipywidgets in the kernel and its extension in JupyterLab. Widgets appear only if both match."""
    from jupyter_core.paths import jupyter_path

    halves = [r for r in _requirements("", "ipywidgets") if r.name in ("jupyterlab_widgets", "widgetsnbextension")]
    unfit = list(_unfit(halves))
    if unfit:
        return Check("widgets", PROBLEM, _described(unfit), f"{_pip()} {_arguments(unfit)}")
    manager = "labextensions/@jupyter-widgets/jupyterlab-manager/package.json"
    if not any(Path(folder, manager).is_file() for folder in jupyter_path()):
        fix = f"{_pip()} --force-reinstall --no-deps jupyterlab_widgets"
        return Check("widgets", PROBLEM, "the JupyterLab extension's files are missing", fix)
    return Check("widgets", OK, f"ipywidgets {_version('ipywidgets')} and its JupyterLab extension fit")


def _model() -> Check:
    from kvlab.errors import ModelError
    from kvlab.model import load_model

    try:
        model = load_model()
    except ModelError as error:
        return Check("model", PROBLEM, str(error), f"git checkout -- {_near(CHECKOUT / 'kvlab/model/pretrained')}")
    size = sum(parameter.numel() for parameter in model.parameters())
    return Check("model", OK, f"the trained model loads, {size / 1e6:.1f} million parameters")


def _redis() -> Check:
    if url := os.environ.get("KVLAB_STORE"):
        return _named_store(url)
    if shutil.which("redis-server"):
        return Check("Redis", OK, "redis-server is installed; the lessons that need one start it")
    fix = "sudo apt-get install redis-server, or: brew install redis"
    return Check("Redis", MISSING, "the lessons use an in-process Redis and recorded results", fix)


def _named_store(url: str) -> Check:
    """Check the store that KVLAB_STORE names. A store that does not answer is a problem."""
    from kvlab.errors import ConfigError
    from kvlab.stores import Health, open_store

    try:
        with open_store(url) as store:
            health = store.health()
    except ConfigError as error:
        health = Health(False, str(error))
    if health.ok:
        return Check("Redis", OK, f"KVLAB_STORE: {health.detail}")
    fix = "start this store, correct its URL, or run: unset KVLAB_STORE"
    return Check("Redis", PROBLEM, f"KVLAB_STORE: {health.detail}", fix)


def _gpu() -> Check:
    if _version("torch"):
        import torch

        if torch.cuda.is_available():
            return Check("GPU", OK, torch.cuda.get_device_name(0))
    return Check("GPU", MISSING, "none that torch can use; every lesson runs on the CPU")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # as in kvlab.lab.streams, which may not be importable
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())
