"""What a release has in it, and that it works away from the repository: `scripts/build_release.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import build_release as release
from scripts.repository import BLOB, URL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](docs/a.md#b)", f"[a]({URL}/blob/main/docs/a.md#b)"),
        ("![a [b] c](docs/a.png)", f"![a [b] c]({URL}/raw/main/docs/a.png)"),
        ("[`a`](b.py), [c](d.md)", f"[`a`]({URL}/blob/main/b.py), [c]({URL}/blob/main/d.md)"),
        ("[a](#b)", f"[a]({URL}/blob/main/README.md#b)"),
        *((text, text) for text in ("[a](https://b.c/d)", "`[a](b)`", "```\n[a](b)\n```", "f(x)[0](y z)")),
    ],
)
def test_links_lead_to_the_repository(written: str, shown: str) -> None:
    assert release.absolute_links(written) == shown


def test_every_link_of_readme_is_absolute_and_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", release.absolute_links(README))
    assert all(link.startswith("https://") for link in links), links
    own = {
        re.sub(r"#.*", "", link.removeprefix(base)) for base in (BLOB, release.RAW) for link in links if base in link
    }
    assert "docs/request.png" in own and len(own) > 30
    assert [name for name in own if not (ROOT / name).is_file()] == []


def wheel_of(folder: Path, *names: str) -> Path:
    path = folder / "kvlab-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
    return path


def test_a_whole_wheel_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release.check_contents(wheel_of(tmp_path, *release.SHIPPED, "kvlab-0.dist-info/METADATA"))
    assert f"{len(release.SHIPPED) + 1} files" in capsys.readouterr().out


@pytest.mark.parametrize("missing", release.SHIPPED)
def test_a_wheel_without_the_data_of_the_package_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(release.ReleaseError, match=rf"missing \['{missing}'\], too much \[\]"):
        release.check_contents(wheel_of(tmp_path, *(name for name in release.SHIPPED if name != missing)))


@pytest.mark.parametrize("surplus", ["tests/test_a.py", "kvlab/__pycache__/a.cpython-311.pyc"])
def test_a_wheel_with_more_than_the_package_is_refused(tmp_path: Path, surplus: str) -> None:
    with pytest.raises(release.ReleaseError, match=rf"missing \[\], too much \['{surplus}'"):
        release.check_contents(wheel_of(tmp_path, *release.SHIPPED, surplus))


def test_a_step_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    program = "import sys; print('half'); sys.exit('broken')"
    with pytest.raises(release.ReleaseError, match=r"^try: exit status 1\nhalf\n\nbroken\n$"):
        release.step("try", [sys.executable, "-c", program], tmp_path)


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_is(tmp_path: Path) -> None:
    """The wheel of HEAD, in front of the environment's other packages: README's first example, and the doctor."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    source, target, empty = (tmp_path / name for name in ("source", "target", "empty"))
    empty.mkdir()
    release.export(source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    release.check_contents(wheel)
    zipfile.ZipFile(wheel).extractall(target)
    programs = (
        f"import kvlab; assert kvlab.__file__.startswith({str(target)!r}), kvlab.__file__\n"
        + release.first_example(README),
        "from kvlab.course.doctor import _model; print(_model())",
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=empty, env=env, capture_output=True, text=True)
        for program in programs
    ]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert runs[0].stdout.splitlines() == ["0 128 160", "True", "0 True"]
    assert runs[1].stdout.startswith("ok ")
    assert list(empty.iterdir()) == []
