"""What is said where Ray cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kvlab.errors import KVLabError
from kvlab.serve import application, private_ray


def run(code):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_the_message_says_how_to_get_it():
    with pytest.raises(KVLabError, match="pip install"), private_ray():
        pass
    with pytest.raises(KVLabError, match="pip install"):
        application()


def test_importing_the_package_imports_no_ray():
    assert run("import sys, kvlab.serve; assert 'ray' not in sys.modules").returncode == 0


@pytest.mark.ray
def test_ray_that_was_imported_before_is_refused_with_the_remedy():
    done = run("import ray; from kvlab.serve import private_ray\nwith private_ray(): pass")
    assert "KVLabError: Ray was imported before, without RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in done.stderr
    assert "restart the kernel" in done.stderr


@pytest.mark.ray
def test_settings_that_would_open_it_are_replaced():
    code = (
        "import os; os.environ['RAY_AUTH_MODE'] = 'disabled'; os.environ['RAY_AUTH_TOKEN'] = 'mine'\n"
        "from kvlab.serve.private import prepare; prepare(); import ray; prepare()\n"
        "print(os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN'])"
    )
    assert run(code).stdout.split() == ["token", "mine"]
