"""Is this machine ready for the course? One line for each thing looked at, with the command that mends it.

`python -m kvlab doctor` prints the lines. It imports `kvlab`, hence torch; where even that
fails, `python kvlab/course/doctor.py` says the same: nothing outside the standard library is
imported here before its own check.
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
EXTRAS = {"hf": "transformers models", "secure": "encrypted records", "test": "the tests"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `status` is "ok", "optional, missing" or "problem"; `fix` a command, or empty."""

    name: str
    status: str
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<18} {self.name:<15} {self.detail}" + (f"; to mend it: {self.fix}" if self.fix else "")


def checks() -> list[Check]:
    """Look at everything. Never raises: what breaks a check is that check's problem."""
    return [
        _guarded("Python", _python),
        _guarded("packages", _packages),
        _guarded("Jupyter kernel", _kernel),
        _guarded("widgets", _widgets),
        _guarded("model", _model),
        _guarded("Redis", _redis),
        _guarded("GPU", _gpu),
        *(_guarded(f"extra {name}", partial(_extra, name)) for name in EXTRAS),
    ]


def run(out: Callable[[str], object] = print) -> int:
    """Say what `checks` found, line by line; return the exit status: 1 if there is a problem, else 0."""
    found = checks()
    for check in found:
        out(str(check))
    problems = sum(check.status == PROBLEM for check in found)
    out(f"{problems} to mend" if problems else "ready")
    return 1 if problems else 0


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # whatever it is, the reader needs a line, not a traceback
        said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        return Check(name, PROBLEM, said.splitlines()[0], f"{_pip()} -e {_near(CHECKOUT, '[course]')}")


def _near(path: Path, extra: str = "") -> str:
    """A path as one types it here: relative while both are in the course's folder."""
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
    wanted = [*_requirements(""), *_requirements("course")]
    unfit = list(_unfit(wanted))
    if not unfit:
        return Check("packages", OK, f"all {len(wanted)} are there in versions that fit")
    return Check("packages", PROBLEM, _said(unfit), f"{_pip()} {_arguments(unfit)}")


def _extra(name: str) -> Check:
    unfit = list(_unfit(_requirements(name)))
    if not unfit:
        return Check(f"extra {name}", OK, f"{EXTRAS[name]} will run")
    return Check(f"extra {name}", MISSING, f"for {EXTRAS[name]}: {_said(unfit)}", f"{_pip()} {_arguments(unfit)}")


def _requirements(extra: str, package: str = "kvlab") -> list[Requirement]:
    """What the installed `package` requires: without any extra, or only what `extra` adds."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires(package) or ()]
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]
    return [r for r in here if ("extra ==" in str(r.marker)) == bool(extra)]


def _unfit(wanted: Iterable[Requirement]) -> Iterable[tuple[Requirement, str | None]]:
    """The requirements that are not met, each with the version that is installed instead."""
    for requirement in wanted:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield requirement, version


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(unfit: Iterable[tuple[Requirement, str | None]]) -> str:
    return ", ".join(f"{r.name} is missing" if v is None else f"{r.name} {v} is not {r.specifier}" for r, v in unfit)


def _arguments(unfit: Iterable[tuple[Requirement, str | None]]) -> str:
    return " ".join(shlex.quote(f"{r.name}{r.specifier}") for r, _ in unfit)


def _kernel() -> Check:
    """A kernel of another environment of this user may carry the same name; it would not find kvlab."""
    from jupyter_client.kernelspec import KernelSpecManager

    if _version("ipykernel") is None:
        return Check("Jupyter kernel", PROBLEM, "ipykernel is missing", f"{_pip()} ipykernel")
    program = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    if program.is_absolute() and program.parent.resolve() != Path(sys.executable).parent.resolve():
        fix = f"{_python_here()} -m ipykernel install --sys-prefix"
        return Check("Jupyter kernel", PROBLEM, f"python3 starts another environment: {program}", fix)
    return Check("Jupyter kernel", OK, "python3 starts this environment")


def _widgets() -> Check:
    """Two halves that must match: ipywidgets in the kernel and an extension in JupyterLab, else nothing shows."""
    from jupyter_core.paths import jupyter_path

    halves = [r for r in _requirements("", "ipywidgets") if r.name in ("jupyterlab_widgets", "widgetsnbextension")]
    unfit = list(_unfit(halves))
    if unfit:
        return Check("widgets", PROBLEM, _said(unfit), f"{_pip()} {_arguments(unfit)}")
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
    return Check("Redis", MISSING, "an in-process Redis and recorded results stand in", fix)


def _named_store(url: str) -> Check:
    """Whoever named a store wants that one: it is a problem if it does not answer."""
    from kvlab.errors import ConfigError
    from kvlab.stores import Health, open_store

    try:
        with open_store(url) as store:
            health = store.health()
    except ConfigError as error:
        health = Health(False, str(error))
    if health.ok:
        return Check("Redis", OK, f"KVLAB_STORE: {health.detail}")
    fix = "start that store or correct its URL, or go without: unset KVLAB_STORE"
    return Check("Redis", PROBLEM, f"KVLAB_STORE: {health.detail}", fix)


def _gpu() -> Check:
    if _version("torch"):
        import torch

        if torch.cuda.is_available():
            return Check("GPU", OK, torch.cuda.get_device_name(0))
    return Check("GPU", MISSING, "none that torch can use; every lesson runs on the CPU")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # as kvlab.lab.streams does, which may be out of reach here
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())
