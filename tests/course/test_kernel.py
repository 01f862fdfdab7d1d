"""Nothing that a user has set changes what a kernel of a strict run is like, one variable at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.course.kernel import FIXED, FOLDERS, kernel_environment

PROBE = """
import os, shutil, sys, time, urllib.request, warnings
print(sys.flags, sys.warnoptions, warnings.filters, sys.path, sys.pycache_prefix)
print(sys.stdout.encoding, sys.stdout.errors, sys.stdout.write_through, sys.getfilesystemencoding())
print(time.tzname, shutil.get_terminal_size(), urllib.request.getproxies())
print(sorted(os.environ.items()))
"""
HOSTILE = {
    "PYTHONWARNINGS": "error",
    "PYTHONHASHSEED": "1",
    "PYTHONIOENCODING": "latin-1:replace",
    "PYTHONUTF8": "0",
    "PYTHONDEVMODE": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSTARTUP": "startup.py",
    "PYTHONPATH": "/somewhere",
    "PYTHONSAFEPATH": "1",
    "PYTHONTRACEMALLOC": "3",
    "PYTHONPYCACHEPREFIX": "/tmp/elsewhere",
    "LANG": "tr_TR.ISO-8859-9",
    "LC_ALL": "C",
    "LC_NUMERIC": "de_DE",
    "TZ": "Asia/Kathmandu",
    "COLUMNS": "37",
    "LINES": "3",
    "NO_COLOR": "1",
    "FORCE_COLOR": "1",
    "TERM": "dumb",
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": "/somewhere",
    "MATPLOTLIBRC": "/somewhere/matplotlibrc",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "7",
    "KVLAB_STORE": "redis://example.org",
    "KVLAB_RECORD": "1",
    "KVLAB_WORK": "/somewhere",
    "IPYTHONDIR": "/somewhere",
    "JUPYTER_CONFIG_DIR": "/somewhere",
    "JUPYTER_PATH": "/somewhere",
    "JUPYTER_PLATFORM_DIRS": "1",
    "XDG_CACHE_HOME": "/somewhere",
    "XDG_CONFIG_HOME": "/somewhere",
    "HTTP_PROXY": "http://example.org:3128",
    "https_proxy": "http://example.org:3128",
    "PYTEST_ADDOPTS": "--no-such-option",
    "A_VARIABLE_OF_TOMORROW": "1",
}


def seen(folder: Path) -> str:
    """What a Python sees that is started as a kernel is."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=kernel_environment(folder), capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0 and run.stderr == "", run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture(scope="module")
def plain(folder: Path) -> str:
    """The same without any of those variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOSTILE:
            patch.delenv(name, raising=False)
        return seen(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_kernel_is_the_same_whatever_the_user_has_set(
    folder: Path, plain: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, HOSTILE[name])
    assert seen(folder) == plain


def test_what_programs_need_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + "more")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    made = kernel_environment(folder)
    assert made["PATH"] == os.environ["PATH"] and made["TMPDIR"] == "/elsewhere"
    assert FIXED.items() <= made.items()


def test_every_kernel_finds_folders_of_its_own_and_empty(tmp_path: Path) -> None:
    made = kernel_environment(tmp_path)
    for name, sub in FOLDERS.items():
        assert made[name] == str(tmp_path / sub) and list((tmp_path / sub).iterdir()) == []


def test_what_is_wanted_on_purpose_is_added(tmp_path: Path) -> None:
    assert kernel_environment(tmp_path, KVLAB_RECORD="1")["KVLAB_RECORD"] == "1"
