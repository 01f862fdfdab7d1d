"""What people install and start agrees with itself: pyproject, lock, conda file, Dockerfile, compose file, set-up."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvlab.testbed.server import RedisServer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NODES = [f"cluster-{i}" for i in range(1, 7)]
FOLLOWED = ["primary", "replica-1", "replica-2"]
SENTINELS = [f"sentinel-{i}" for i in range(1, 4)]
WATCHERS = ["redis-exporter", "prometheus", "grafana"]
LOCKED_EXTRAS = ("course", "test", "hf", "secure", "metrics", "site")


def lock_lines():
    return (ROOT / "requirements.lock").read_text("ascii").splitlines()


def pins():
    requirements = [Requirement(line) for line in lock_lines() if not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


def wanted():
    """What the locked environment must fulfil: the package's own requirements and those of its extras."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in LOCKED_EXTRAS for line in extras[name])]
    return [Requirement(line) for line in lines]


def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def conda_pip():
    return next(entry["pip"] for entry in conda()["dependencies"] if isinstance(entry, dict))


def services():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def server_options(name):
    """The options of a Redis in the compose file."""
    program, *common = services()[name]["entrypoint"]
    assert program == "redis-server"
    arguments = [*common, *services()[name]["command"]]
    assert all(option.startswith("--") for option in arguments[::2])
    assert len(set(arguments[::2])) == len(arguments[::2]), "an option is given twice"
    return {option.removeprefix("--"): value for option, value in zip(arguments[::2], arguments[1::2], strict=True)}


# --- the lock file ------------------------------------------------------------------------------
@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_every_requirement_has_a_pin_in_its_range(requirement):
    (pin,) = pins()[canonicalize_name(requirement.name)].specifier
    assert requirement.specifier.contains(pin.version)


def test_every_pin_is_exact_and_nothing_else_is_in_the_lock():
    first, *rest = lock_lines()
    assert first.startswith("# ")
    for line in rest:
        assert re.fullmatch(r'[\w.-]+==[\w.]+( ; (sys_platform|python_full_version) [=<]+ "[\w.]+")?', line), line
    assert rest == sorted(rest, key=str.upper)
    assert len(pins()) == len(rest), "a package is pinned twice"


def test_the_lock_names_no_build_and_no_cuda():
    assert str(pins()["torch"].specifier) == "==2.13.0"
    assert not [name for name in pins() if re.match("nvidia|cuda|triton", name)]


def test_requirements_are_ranges_with_an_end():
    """A new major version is tried before readers get it. What follows the calendar has no such versions."""
    for requirement in wanted():
        if requirement.name not in ("cryptography", "furo"):
            operators = {specifier.operator for specifier in requirement.specifier}
            assert operators == {">=", "<"}, str(requirement)


# --- Colab and Binder ---------------------------------------------------------------------------
# Of pip-freeze.txt and os-info.txt in github.com/googlecolab/backend-info, 19 August 2026. pip must not replace
# what Colab's kernel runs on, and a second torch would take minutes.
COLAB = {
    "cryptography": "50.0.0",
    "ipykernel": "6.17.1",
    "ipywidgets": "7.7.1",
    "matplotlib": "3.10.0",
    "numpy": "2.1.3",
    "safetensors": "0.8.0",
    "seaborn": "0.13.2",
    "tokenizers": "0.22.2",
    "torch": "2.11.0",
    "xxhash": "4.0.1",
    "zstandard": "0.25.0",
}


def test_on_colab_pip_replaces_nothing():
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["course"]]
    requirements = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    assert requirements.keys() - COLAB.keys() == {"redis", "hiredis", "fakeredis", "jupyterlab"}  # it lacks them
    assert {name for name, version in COLAB.items() if not requirements[name].contains(version)} == set()


def test_binder_makes_the_kernel_with_the_one_set_up_script():
    """A Dockerfile or an environment.yml in the folder would win; without a folder those of the root do."""
    folder = ROOT / ".binder"
    assert {path.name for path in folder.iterdir()} == {"apt.txt", "postBuild", "runtime.txt"}
    assert os.access(folder / "postBuild", os.X_OK)
    assert "sh scripts/setup.sh\n" in (folder / "postBuild").read_text()
    assert (folder / "apt.txt").read_text().split() == ["redis-server"]
    assert "python=" + (folder / "runtime.txt").read_text().strip().removeprefix("python-") in conda()["dependencies"]


def test_binders_python3_kernel_is_the_one_of_the_set_up(tmp_path):
    """Binder's JupyterLab, in an environment of its own, looks for kernels in that prefix."""
    shutil.copytree(ROOT / ".binder", tmp_path / ".binder")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    program(tmp_path / "scripts", "setup.sh", 'test "$PYTHON" = python')
    env = {**os.environ, "NB_PYTHON_PREFIX": str(tmp_path / "server")}
    subprocess.run([".binder/postBuild"], cwd=tmp_path, env=env, check=True, capture_output=True)
    spec = json.loads((tmp_path / "server/share/jupyter/kernels/python3/kernel.json").read_text())
    assert spec["argv"][0] == sys.executable


# --- conda --------------------------------------------------------------------------------------
def test_conda_installs_the_lock_and_the_package():
    assert conda()["name"] == PROJECT["name"]
    assert conda()["channels"] == ["conda-forge"]
    assert conda_pip()[0] == "-r requirements.lock"
    assert conda_pip()[-1] == "-e .[course,test]"


def test_conda_shows_what_matters_and_invents_nothing():
    named = set(conda_pip()[1:-1])
    assert named <= {requirement.name for requirement in wanted()}
    assert named >= {"jupyterlab", "torch", "redis", "fakeredis", "matplotlib", "seaborn", "nbval", "ipywidgets"}


def test_conda_python_is_one_that_the_package_takes():
    (python,) = (entry for entry in conda()["dependencies"] if str(entry).startswith("python="))
    assert PROJECT["requires-python"] == ">=3.11"
    assert python == "python=3.11"


# --- containers ---------------------------------------------------------------------------------
def test_redis_is_pinned_and_reached_by_jupyter_alone():
    redis = services()["redis"]
    assert redis["image"] == "redis:8.10.2"
    assert "ports" not in redis and "network_mode" not in redis
    assert redis["networks"] == ["cache"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert compose["networks"]["cache"]["internal"] is True


def test_redis_is_a_bounded_cache():
    options = server_options("redis")
    assert (options["save"], options["appendonly"]) == ("", "no")
    assert (options["maxmemory"], options["maxmemory-policy"]) == ("512mb", "allkeys-lfu")
    assert options["client-output-buffer-limit"].startswith("normal 256mb ")
    assert services()["redis"]["mem_limit"] == "768m"
    assert not {"cluster-enabled", "replicaof"} & options.keys()


def test_jupyter_is_published_on_this_machine_alone_and_keeps_its_token():
    jupyter = services()["jupyter"]
    assert jupyter["ports"] == ["127.0.0.1:8888:8888"]
    assert jupyter["environment"]["JUPYTER_TOKEN"] == "${JUPYTER_TOKEN:-}"
    assert jupyter["environment"]["KVLAB_STORE"] == "${KVLAB_COMPOSE_STORE:-redis://redis:6379/0}"
    assert "token=" not in (ROOT / "Dockerfile").read_text() + (ROOT / "docker-compose.yml").read_text()


@pytest.mark.parametrize("name", services())
def test_containers_may_do_nothing_that_they_need_not(name):
    service = services()[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["healthcheck"]["test"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices", "network_mode"} & service.keys()
    if name in WATCHERS:
        assert service["user"].split(":")[0] not in ("", "0") and service["mem_limit"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"])
        assert all(mount.endswith(":ro") for mount in service.get("volumes", []) if mount.startswith("."))
    elif name != "jupyter":
        assert (service["image"], service["user"], service["networks"]) == ("redis:8.10.2", "999:999", ["cache"])
        assert service["mem_limit"] and "/tmp" in service["tmpfs"]
        assert not {"ports", "volumes"} & service.keys()


def test_redis_and_jupyter_start_without_a_profile_and_the_two_sets_each_with_theirs():
    sets = {name: service.get("profiles", []) for name, service in services().items()}
    assert {name for name, profiles in sets.items() if not profiles} == {"redis", "jupyter"}
    assert {name for name, profiles in sets.items() if profiles == ["cluster"]} == {*NODES, "cluster-keeper"}
    assert {name for name, profiles in sets.items() if profiles == ["sentinel"]} == {*FOLLOWED, *SENTINELS}
    assert {name for name, profiles in sets.items() if profiles == ["monitoring"]} == set(WATCHERS)
    assert len(sets) == 2 + 7 + 6 + 3


def test_grafana_alone_is_published_and_cannot_reach_redis():
    ports = {name: services()[name].get("ports") for name in WATCHERS}
    assert ports == {"redis-exporter": None, "prometheus": None, "grafana": ["127.0.0.1:3000:3000"]}
    assert [services()[name]["networks"] for name in WATCHERS] == [["cache"], ["cache", "watch"], ["outside", "watch"]]
    assert yaml.safe_load((ROOT / "docker-compose.yml").read_text())["networks"]["watch"]["internal"] is True
    environment = services()["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for name in environment if "PASSWORD" in name]


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_what_the_watchers_mount_is_there_and_in_its_place(name):
    mounts = dict(mount.split(":")[:2] for mount in services()[name]["volumes"] if mount.startswith("."))
    assert all((ROOT / source).is_file() for source in mounts)
    if name == "prometheus":  # rule files are looked for beside prometheus.yml
        config = yaml.safe_load((ROOT / "docs/monitoring/prometheus.yml").read_text())
        rules = {f"/etc/prometheus/{file}" for file in config["rule_files"]}
        assert rules | {"/etc/prometheus/prometheus.yml"} == set(mounts.values())
        targets = [t for job in config["scrape_configs"] for s in job["static_configs"] for t in s["targets"]]
        assert {target.split(":")[0] for target in targets} == {"jupyter", "redis-exporter"} <= services().keys()
    else:
        provider = yaml.safe_load((ROOT / "docs/monitoring/grafana-dashboards.yml").read_text())["providers"][0]
        assert "/etc/grafana/dashboards/kvlab.json" in mounts.values()
        assert provider["options"]["path"] == "/etc/grafana/dashboards"
        source = yaml.safe_load((ROOT / "docs/monitoring/grafana-datasource.yml").read_text())["datasources"][0]
        assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")


def test_the_six_nodes_of_the_cluster_are_alike():
    first, *others = (services()[name] for name in NODES)
    assert all(other == first for other in others)
    options = server_options("cluster-1")
    assert (options["cluster-enabled"], options["cluster-node-timeout"]) == ("yes", "5000")
    assert options["cluster-require-full-coverage"] == "no"
    assert options["maxmemory"] == "256mb"
    assert " ".join(NODES) in services()["cluster-keeper"]["command"][0]
    assert services()["cluster-keeper"]["depends_on"] == NODES


def test_two_of_three_sentinels_decide_and_all_watch_the_first_redis():
    for name in SENTINELS:
        assert "sentinel monitor kvlab primary 6379 2\n" in services()[name]["entrypoint"][2]
        assert services()[name]["command"] == [name]
    for name in FOLLOWED:
        options = server_options(name)
        assert (options["replica-announce-ip"], options["maxmemory"]) == (name, "256mb")
        assert options.get("replicaof") == (None if name == "primary" else "primary 6379")


@pytest.mark.parametrize("name", ["cluster-keeper", "sentinel-1"])
def test_the_scripts_in_the_compose_file_are_shell(name):
    service = services()[name]
    script = (service["entrypoint"] + service["command"])[2].replace("$$", "$")
    run = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.redis
@pytest.mark.parametrize("name", ["redis", "cluster-1", "primary"])
def test_a_server_takes_the_options(name):
    options = {option: value for option, value in server_options(name).items() if option != "dir"}
    words = [word for option, value in options.items() for word in (f"--{option}", value)]
    with RedisServer(*words, bus=name == "cluster-1") as server:
        client = server.client()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lfu"}
        assert client.info("cluster")["cluster_enabled"] == (name == "cluster-1")


def test_what_the_learner_writes_survives_the_container():
    assert services()["jupyter"]["volumes"] == ["home:/home/learner"]
    assert "install -d -o 1000 -g 1000 /home/learner/work" in (ROOT / "Dockerfile").read_text()


def test_the_image_ends_as_an_ordinary_user():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    after = lines[lines.index("USER 1000:1000") :]
    assert not [line for line in after if line.startswith(("RUN ", "COPY ", "ADD "))]
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM python:3.11-slim"]


def test_the_image_does_not_take_in_what_git_ignores():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "work", "runs", ".env*"} <= set(ignored)


# --- make and the set-up script -----------------------------------------------------------------
def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


@pytest.fixture
def checkout(tmp_path):
    """What the set-up script reads, in a folder of its own; around it a Linux machine with room and without a GPU."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    program(tmp_path / "bin", "uname", "echo Linux")
    program(tmp_path / "bin", "nvidia-smi", "exit 9")
    has_free_gb(tmp_path, 99)
    return tmp_path


def has_free_gb(checkout, gb):
    program(checkout / "bin", "df", f"echo Filesystem; echo /dev/sda 100000000 1 {gb}000000 89% /")


def setup(folder, *arguments, python=""):
    command = ["sh", "scripts/setup.sh", *arguments]
    env = {**os.environ, "PYTHON": python, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def fake_environment(checkout, pip):
    """A Python that makes a `.venv` whose pip is the given shell text."""
    text = f"""
        case "$1 $2" in
        "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
        "-m pip") echo "$*" >>calls; {pip} ;;
        "--version ") echo Python 3.11.0 ;;
        esac
    """
    return program(checkout / "bin", "python-fake", text)


ONLY_CUDA = """case "$*" in
        *+cpu*) exit 1 ;;
        *--dry-run*) echo "Would install nvidia-cublas-13 torch-2.13.0" ;;
        esac"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_the_targets():
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"make (\w+) ", run.stdout)
    assert targets == ["help", "lab", "demo", "test", "alternatives", "check", "notebooks", "site", "lint", "clean"]


def test_a_python_that_is_too_old_is_refused_in_one_line(checkout):
    old = program(checkout / "bin", "python-old", "exit 1")
    run = setup(checkout, python=old)
    assert run.returncode == 1
    assert run.stderr == (
        f"kvlab set-up: PYTHON={old} is not a working Python 3.11 to 3.14; "
        "set PYTHON to another one, or unset it to search for one\n"
    )


def test_a_python_without_venv_names_the_package_to_install(checkout):
    text = 'case "$2" in *ensurepip*) exit 1 ;; *print*) echo 3.11 ;; esac'
    run = setup(checkout, python=program(checkout / "bin", "python-bare", text))
    assert run.returncode == 1
    assert run.stderr.endswith("sudo apt-get install python3.11-venv\n")
    assert run.stderr.count("\n") == 1


def test_a_full_disk_is_said_before_anything_is_made(checkout):
    has_free_gb(checkout, 1)
    run = setup(checkout)
    assert run.returncode == 1
    assert "needs about 3 GB of disk, and only 1 GB are free" in run.stderr
    assert not (checkout / ".venv").exists()


def test_an_index_out_of_reach_is_said_in_one_line(checkout):
    python = fake_environment(checkout, "echo 'WARNING: NewConnectionError(...)'; echo 'ERROR: No match'; exit 1")
    run = setup(checkout, python=python)
    assert run.returncode == 1
    assert "the package index cannot be reached; check the network" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (checkout / ".venv" / ".ready").exists()


def test_a_disk_that_fills_up_while_installing(checkout):
    python = fake_environment(checkout, "echo 'ERROR: [Errno 28] No space left on device'; exit 1")
    assert "the disk is full" in setup(checkout, python=python).stderr


def test_another_fault_of_pip_is_quoted(checkout):
    python = fake_environment(checkout, "echo 'ERROR: nonsense'; exit 1")
    assert "pip failed: ERROR: nonsense; details: .venv/setup.log" in setup(checkout, python=python).stderr


def test_the_second_run_does_nothing_until_the_lock_changes(checkout):
    python = fake_environment(checkout, ":")
    assert setup(checkout, python=python).stdout.endswith("ready: .venv\n")
    calls = (checkout / "calls").read_text()
    assert "-r requirements.lock" in calls

    again = setup(checkout, python=python)
    assert (again.returncode, again.stdout) == (0, "")
    assert (checkout / "calls").read_text() == calls

    (checkout / "requirements.lock").write_text("torch==2.13.0\nnumpy==2.0.0\n")
    assert "[3/3]" in setup(checkout, python=python).stdout


def test_without_a_gpu_the_cpu_build_is_asked_for_and_only_then_the_usual_one(checkout):
    run = setup(checkout, python=fake_environment(checkout, ONLY_CUDA))
    assert run.returncode == 0, run.stderr
    installs = [line for line in (checkout / "calls").read_text().splitlines() if "torch" in line]
    assert "--no-deps" in installs[0] and installs[0].endswith("torch==2.13.0+cpu")
    assert installs[-1].endswith("install torch==2.13.0")
    assert "no CPU build is available" in run.stdout and "3 GB" in run.stdout


def test_the_usual_build_needs_more_disk(checkout):
    has_free_gb(checkout, 5)
    run = setup(checkout, python=fake_environment(checkout, ONLY_CUDA))
    assert run.returncode == 1
    assert "needs about 10 GB of disk, and only 5 GB are free" in run.stderr


def test_with_a_gpu_the_usual_build_is_taken(checkout):
    program(checkout / "bin", "nvidia-smi", "exit 0")
    setup(checkout, python=fake_environment(checkout, ":"))
    assert "+cpu" not in (checkout / "calls").read_text()


def test_the_working_copy_never_overwrites(checkout):
    (checkout / "notebooks").mkdir()
    for name in ("00_a.ipynb", "01_b.ipynb"):
        (checkout / "notebooks" / name).write_text("from the course")
    (checkout / "work").mkdir()
    (checkout / "work" / "00_a.ipynb").write_text("mine")
    run = setup(checkout, "--copy", "work")
    assert run.stdout == "work: 1 notebooks copied, 1 existing ones not changed\n"
    assert (checkout / "work" / "00_a.ipynb").read_text() == "mine"
    assert (checkout / "work" / "01_b.ipynb").read_text() == "from the course"


# --- nothing of anybody's machine ---------------------------------------------------------------
HOSTS = re.compile(
    r"[\w.-]*(?:pypi|pythonhosted|artifactory|nexus|anaconda|devpi|download\.pytorch)[\w-]*\.(?:org|com|net|io)"
)
PATHS = re.compile(r"(?<![\w.$~{}<>/-])/(?:root|Users|home|opt|mnt|media|srv|work)/[\w.-]+(?:/[\w.-]+)*")
OURS = re.compile(r"/home/learner(/work)?|/home/someone/.*|/opt/homebrew/.*")  # the image's, an example's, every Mac's


def tracked_files():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name and name != "tests/test_packaging.py"]


def texts():
    for path in tracked_files():
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content[:8192]:
                yield path.relative_to(ROOT).as_posix(), content.decode("utf-8", "replace")


def test_no_file_names_a_package_registry_but_the_set_up_script():
    found = {(name, host) for name, text in texts() for host in HOSTS.findall(text)}
    assert found <= {("scripts/setup.sh", "download.pytorch.org")}


def test_no_file_names_a_folder_of_somebodys_machine():
    found = [(name, path) for name, text in texts() for path in PATHS.findall(text) if not OURS.fullmatch(path)]
    assert not found


def test_docker_and_ci_call_the_one_set_up_script():
    assert "sh scripts/setup.sh" in (ROOT / "Dockerfile").read_text()
    assert "sh scripts/setup.sh" in (ROOT / "Makefile").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", use) for use in re.findall(r"uses: (\S+)", workflow))


def test_no_document_holds_a_placeholder() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        assert not re.search(r"^(TODO|[A-Z]+_TABLE)\b", document.read_text(), re.MULTILINE), document


def test_the_readme_shows_the_demo_of_today() -> None:
    from kvlab.lab.demo import HEADER

    assert HEADER in (ROOT / "README.md").read_text()


def test_the_changelog_begins_with_this_version_and_its_day():
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and re.fullmatch(rf"{re.escape(PROJECT['version'])} \(\d{{4}}-\d\d-\d\d\)", newest[1])


def lock_beside(name):
    lines = (ROOT / f"requirements-{name}.lock").read_text("ascii").splitlines()
    return {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if not line.startswith("#"))}


def test_the_lock_of_ray_fulfils_its_extra():
    (wanted,) = (Requirement(line) for line in PROJECT["optional-dependencies"]["ray"])
    (pin,) = lock_beside("ray")["ray"].specifier
    assert wanted.specifier.contains(pin.version) and pin.operator == "=="


@pytest.mark.parametrize("name", ["ray", "alternatives"])
def test_what_is_installed_beside_is_exact_and_repeats_nothing(name):
    own = lock_beside(name)
    assert all([pin.operator for pin in r.specifier] == ["=="] for r in own.values())
    assert not own.keys() & pins().keys(), f"installed twice: .venv-{name} lies in front of .venv"


def test_the_stores_of_others_and_ray_can_be_installed_together():
    assert not lock_beside("ray").keys() & lock_beside("alternatives").keys()


@pytest.mark.parametrize("trace", ["nothing.jsonl", "docs"])
def test_alternatives_say_in_one_line_that_a_trace_cannot_be_read(trace):
    run = subprocess.run(["sh", "scripts/alternatives.sh", trace], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"alternatives: {trace} is not a file that can be read\n"


def test_the_address_of_the_repository_is_set_once():
    """What names it in a text names the one of pyproject; programs take it from there."""
    address = PROJECT["urls"]["Repository"]
    assert f"git clone {address} && cd {PROJECT['name']}" in (ROOT / "README.md").read_text()
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    links = {link for text in texts for link in re.findall(r"https://github\.com/[\w-]+/kvlab\b", text.read_text())}
    assert links == {address}
    owner = address.removeprefix("https://github.com/")
    for host in ("https://colab.research.google.com/github/", "https://mybinder.org/v2/gh/"):
        found = {link for text in texts for link in re.findall(f"{host}([\\w-]+/[\\w-]+)", text.read_text())}
        assert found == {owner}, host
    programs = [*ROOT.glob("scripts/*.py"), *ROOT.glob("docs/site/*.py"), *ROOT.glob("kvlab/**/*.py")]
    assert [path for path in programs if address.removeprefix("https://") in path.read_text()] == []
