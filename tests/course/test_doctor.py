"""The doctor's lines: good on this machine, and for each thing that can be wrong the command that mends it."""

import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kvlab.course import doctor
from kvlab.course.doctor import MISSING, OK, PROBLEM, Check, checks, run
from kvlab.errors import ModelError
from kvlab.testbed.server import RedisServer

NEEDED = ["Python", "packages", "Jupyter kernel", "widgets", "model"]


@pytest.fixture(autouse=True)
def no_redis_named(monkeypatch):
    monkeypatch.delenv("KVLAB_STORE", raising=False)


@pytest.fixture
def pretend(monkeypatch):
    """Make packages look like another version, or missing with None."""

    def set_versions(**versions):
        real = metadata.version
        versions = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name):
            answer = versions.get(name.replace("_", "-"), "real")
            if answer is None:
                raise metadata.PackageNotFoundError(name)
            return real(name) if answer == "real" else answer

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


def found(name):
    return next(check for check in checks() if check.name == name)


def test_this_environment_is_ready():
    lines = []
    assert run(lines.append) == 0
    assert lines[-1] == "ready"
    assert {name: found(name).status for name in NEEDED} == dict.fromkeys(NEEDED, OK)


def test_every_line_is_one_line_and_begins_with_its_status():
    for check in checks():
        assert "\n" not in str(check)
        assert str(check).startswith(check.status)
        assert check.status in (OK, MISSING, PROBLEM)
        assert check.fix == "" or check.status != OK


def test_a_missing_package_is_a_problem_with_the_command_that_installs_it(pretend):
    pretend(hiredis=None)
    lines = []
    assert run(lines.append) == 1
    line = next(line for line in lines if " packages " in line)
    assert line.startswith("problem") and "hiredis is missing" in line
    assert "python" in line and " -m pip install 'hiredis<4,>=3.2'" in line
    assert lines[-1] == "problems: 1"


def test_a_version_out_of_range_is_named_with_its_range(pretend):
    pretend(numpy="1.20.0", seaborn="0.12.0")
    check = found("packages")
    assert check.status == PROBLEM
    assert "numpy 1.20.0 is not <3,>=1.26, seaborn 0.12.0 is not" in check.detail
    assert "'numpy<3,>=1.26' 'seaborn<0.14,>=0.13.2'" in check.fix


def test_commands_are_as_short_as_where_one_stands_allows(monkeypatch, tmp_path):
    here = doctor.CHECKOUT / ".venv" / "bin" / "python"
    monkeypatch.chdir(doctor.CHECKOUT / "tests")
    assert doctor._near(here) == "../.venv/bin/python"
    assert doctor._near(Path("/usr/bin/python3")) == "/usr/bin/python3"
    monkeypatch.chdir(tmp_path)
    assert doctor._near(here) == shlex.quote(str(here))


def test_a_local_build_of_torch_fits(pretend):
    pretend(torch="2.13.0+cpu")
    assert found("packages").status == OK


def test_a_missing_extra_is_optional(pretend):
    pretend(transformers=None)
    check = found("extra hf")
    assert check.status == MISSING
    assert "transformers is missing" in check.detail and check.fix.endswith("'transformers<6,>=5.23'")
    assert run(lambda _: None) == 0


def test_the_package_without_the_course_is_ready(monkeypatch, tmp_path, pretend):
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    pretend(ipykernel=None, jupyterlab=None, seaborn=None)
    assert run(lambda _: None) == 0
    assert not {"Jupyter kernel", "widgets"} & {check.name for check in checks()}
    assert found("extra course").status == MISSING
    assert "jupyterlab is missing, ipykernel is missing, seaborn is missing" in found("extra course").detail
    pretend(ipykernel=None, numpy=None)
    assert found("packages").detail == "numpy is missing"
    assert run(lambda _: None) == 1


def test_the_course_without_a_checkout_is_checked_whole(monkeypatch, tmp_path, pretend):
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    pretend(seaborn=None)
    assert found("packages").detail == "seaborn is missing"
    assert found("Jupyter kernel").status == OK
    monkeypatch.setattr(metadata, "requires", lambda name: ["not a requirement"])
    assert found("packages").fix.endswith(" -m pip install 'kvlab[course]'")


def test_a_checkout_without_jupyter_is_not_ready(pretend):
    pretend(ipykernel=None)
    assert found("packages").detail == "ipykernel is missing"
    assert "extra course" not in {check.name for check in checks()}


def test_kvlab_that_was_never_installed(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert found("packages").status == PROBLEM
    assert found("packages").fix.endswith("[course]'")


def test_an_old_python():
    check = doctor._python((3, 10, 4))
    assert (check.status, check.detail) == (PROBLEM, "expected 3.11 or newer, got 3.10.4")
    assert "PYTHON=" in check.fix


def test_a_kernel_of_another_environment(monkeypatch, tmp_path):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = '["/elsewhere/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]'
    (folder / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "other", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    check = found("Jupyter kernel")
    assert check.status == PROBLEM
    assert check.detail == "python3 starts another environment: /elsewhere/bin/python"
    assert check.fix.endswith("-m ipykernel install --sys-prefix")


def test_no_kernel_at_all(pretend):
    pretend(ipykernel=None)
    assert found("Jupyter kernel").status == PROBLEM


def test_widgets_of_different_generations(pretend):
    pretend(jupyterlab_widgets="1.1.0")
    check = found("widgets")
    assert check.status == PROBLEM
    assert "jupyterlab_widgets 1.1.0 is not ~=3" in check.detail


def test_widgets_without_their_extension(monkeypatch):
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_: [])
    assert found("widgets").status == PROBLEM


def test_a_damaged_model(monkeypatch):
    def load_model():
        raise ModelError("model.safetensors: damaged or cut short")

    monkeypatch.setattr("kvlab.model.load_model", load_model)
    check = found("model")
    assert check.status == PROBLEM
    assert "damaged or cut short" in check.detail and check.fix.startswith("git checkout")


def test_a_redis_that_was_named_and_does_not_answer(monkeypatch):
    monkeypatch.setenv("KVLAB_STORE", "redis://me:secret@127.0.0.1:1/0")
    lines = []
    assert run(lines.append) == 1
    line = next(line for line in lines if " Redis " in line)
    assert line.startswith("problem") and "redis://me:***@127.0.0.1:1/0" in line
    assert "unset KVLAB_STORE" in line
    assert "secret" not in line


def test_a_redis_url_that_is_none(monkeypatch):
    monkeypatch.setenv("KVLAB_STORE", "localhost:6379")
    assert found("Redis").status == PROBLEM
    assert "expected a store URL" in found("Redis").detail
    assert "unset KVLAB_STORE" in found("Redis").fix


@pytest.mark.redis
def test_a_redis_that_answers(monkeypatch, redis_server: RedisServer):
    monkeypatch.setenv("KVLAB_STORE", redis_server.url)
    assert found("Redis").status == OK
    assert found("Redis").detail.endswith("answers")


def test_no_redis_is_fine(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert found("Redis").status == MISSING
    assert "install redis" in found("Redis").fix


def test_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some GPU")
    assert found("GPU") == Check("GPU", OK, "Some GPU")


def test_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert found("GPU").status == MISSING


def test_it_speaks_where_nothing_is_installed(tmp_path):
    copy = tmp_path / "grün…" / "doctor.py"  # a folder that its lines name
    copy.parent.mkdir()
    copy.write_bytes(Path(doctor.__file__).read_bytes())
    command = [sys.executable, "-S", copy]  # -S: no site-packages
    for encoding in ("utf-8", "latin-1", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": ""}
        run = subprocess.run(command, capture_output=True, encoding=encoding, env=environment, cwd=tmp_path)
        assert (run.returncode, run.stderr) == (1, "")
        assert "problem            packages        No module named 'packaging'; to fix it: " in run.stdout
