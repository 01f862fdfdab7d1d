"""Make the release of the commit that is checked out: an sdist and a wheel in `dist/`, checked and tried.

    python scripts/build_release.py              # build, check, then install each in an empty environment and use it
    python scripts/build_release.py --no-try     # build and check only

The files come from git, not from the folder. Two things differ from `python -m build` in a checkout: README's links
lead to the repository, because its page on PyPI has no files beside it; and the sdist has all that git has, with
the notebooks, documents and tests. Nothing is installed in `.venv` and nothing is uploaded. The environments are
temporary, so the settings of pip say where packages come from; without an NVIDIA GPU, set PIP_EXTRA_INDEX_URL as in
the first lines of environment.yml, or the trial downloads CUDA libraries.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from scripts.repository import BLOB, ROOT, URL

RAW: Final = f"{URL}/raw/main/"
DIST: Final = ROOT / "dist"
TOOLS: Final = ("build>=1.2,<2", "twine>=6,<8")
RELATIVE: Final = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()(?![a-z]+:|//)([^)\s]+)(?=\))")
CODE: Final = re.compile(r"^ *(```+).*?^ *\1 *$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
SHIPPED: Final = (
    "kvlab/py.typed",
    "kvlab/model/heldout.txt",
    "kvlab/model/pretrained/model.safetensors",
    "kvlab/course/recorded/00_redis.json",
)
COMMANDS: Final = (
    ("kvlab", "demo"),
    ("python", "-m", "kvlab", "doctor"),
    ("kvlab", "bench", "hash", "--json"),
)


class ReleaseError(Exception):
    """The release cannot be made; the message says which step failed, and how."""


# --- The source ---------------------------------------------------------------------------------
def absolute_links(markdown: str) -> str:
    """README whose relative links and pictures lead to the repository; links inside code do not change.

    So do links to its own sections, because PyPI may give headings other anchors or none.

    >>> absolute_links("[a](docs/a.md#b), [c](#c), `[d](d)`").replace(URL, "…")
    '[a](…/blob/main/docs/a.md#b), [c](…/blob/main/README.md#c), `[d](d)`'
    """
    codes = [match[0] for match in CODE.finditer(markdown)]
    hidden = CODE.sub("\0", markdown)
    linked = RELATIVE.sub(_absolute, hidden)
    parts = iter(codes)
    return re.sub("\0", lambda _: next(parts), linked)


def _absolute(link: re.Match[str]) -> str:
    before, target = link.groups()
    page = "README.md" if target.startswith("#") else ""
    return f"{before}{RAW if before.startswith('!') else BLOB}{page}{target}"


def export(target: Path) -> None:
    """Write what git has at HEAD to `target`, with README and a manifest made for PyPI."""
    archive = subprocess.run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise ReleaseError(f"git archive: {archive.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(target, filter="data")
    readme = target / "README.md"
    readme.write_text(absolute_links(readme.read_text("utf-8")), "utf-8")
    (target / "MANIFEST.in").write_text("graft .\nprune *.egg-info\nglobal-exclude *.py[cod]\n", "utf-8")


def is_clean() -> bool:
    """Whether what is tracked equals HEAD, so that the release is what is on the screen."""
    return not subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


# --- Running ------------------------------------------------------------------------------------
def environment(folder: Path) -> dict[str, str]:
    """The variables with which programs see the virtual environment `folder`, and nothing of this one."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(folder)}


def new_environment(folder: Path, *requirements: str) -> Path:
    """Make a virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    step("install", [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements], folder)
    return folder


def step(name: str, command: Sequence[str], environ: Path, cwd: Path | None = None) -> str:
    """Run a program in the environment `environ`; print its name and seconds, return what it printed.

    Raises:
        ReleaseError: its exit status is not 0.
    """
    began = time.monotonic()
    run = subprocess.run(command, env=environment(environ), cwd=cwd, capture_output=True, text=True)
    if run.returncode:
        raise ReleaseError(f"{name}: exit status {run.returncode}\n{run.stdout}\n{run.stderr}")
    print(f"{time.monotonic() - began:6.0f} s  {name}", flush=True)
    return run.stdout


# --- Building and checking ----------------------------------------------------------------------
def build(work: Path) -> list[Path]:
    """Build sdist and wheel of HEAD into `dist/`, and let twine check them."""
    source, tools = work / "source", new_environment(work / "tools", *TOOLS)
    export(source)
    for old in DIST.glob("kvlab-*"):
        old.unlink()
    step("build", [str(tools / "bin" / "python"), "-m", "build", "--outdir", str(DIST), str(source)], tools)
    made = sorted(DIST.glob("kvlab-*"))
    step("twine check", [str(tools / "bin" / "twine"), "check", "--strict", *map(str, made)], tools)
    return made


def contents(distribution: Path) -> list[str]:
    """The names of the files in a wheel or an sdist."""
    if distribution.suffix == ".whl":
        return zipfile.ZipFile(distribution).namelist()
    with tarfile.open(distribution) as tar:
        return [member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()]


def check_contents(distribution: Path) -> None:
    """Check that the package's data are in a distribution, and nothing that git does not have.

    Raises:
        ReleaseError: a file is missing or too much.
    """
    names = contents(distribution)
    missing = [name for name in SHIPPED if name not in names]
    surplus = [name for name in names if re.search(r"__pycache__|\.pyc$|(^|/)\.(venv|git)/", name)]
    if distribution.suffix == ".whl":
        surplus += [name for name in names if not re.match(r"kvlab/|kvlab-[^/]*\.dist-info/", name)]
    if missing or surplus:
        raise ReleaseError(f"{distribution.name}: missing {missing}, too much {surplus}")
    print(f"{distribution.stat().st_size / 1e6:6.1f} MB {distribution.name}: {len(names)} files")


def first_example(readme: str) -> str:
    """README's first block of Python."""
    found = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if not found:
        raise ReleaseError("README.md: expected a block of Python")
    return found[1]


def try_out(distribution: Path, work: Path) -> None:
    """Install a distribution in an empty environment, and use it in an empty folder."""
    pins = work / "torch.txt"  # the torch of the lock; newer ones were never tried
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    pins.write_text("".join(re.findall(r"^torch==.*\n", lock, re.MULTILINE)), "utf-8")
    print(f"{distribution.name} in an empty environment:")
    env = new_environment(work / f"env-{distribution.suffix[1:]}", "--constraint", str(pins), str(distribution))
    empty = work / f"folder-{distribution.suffix[1:]}"
    empty.mkdir()
    example = first_example((ROOT / "README.md").read_text("utf-8"))
    commands: dict[str, Sequence[str]] = {" ".join(command): command for command in COMMANDS}
    commands["README's first example"] = ("python", "-c", example)
    for name, (program, *arguments) in commands.items():
        step(name, [str(env / "bin" / program), *arguments], env, empty)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the release; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-try", action="store_true", help="do not install what was built")
    args = parser.parse_args(argv)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    print(f"kvlab {version}, Python {sys.version.split()[0]}")
    try:
        if not is_clean():
            raise ReleaseError("tracked files differ from HEAD; commit or undo the changes")
        with tempfile.TemporaryDirectory(prefix="kvlab-release-") as folder:
            for distribution in build(Path(folder)):
                check_contents(distribution)
                if not args.no_try:
                    try_out(distribution, Path(folder))
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
