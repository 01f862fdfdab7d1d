"""Notebook 11 finds results of GPUs, leaves dry runs out, and names a file that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvlab.course.figures import lesson_11
from kvlab.course.gpu_results import KEYS, gpu_results
from kvlab.errors import InputError


def write(folder: Path, name: str, device: str, **changed: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"gpu-{name}.json"
    content = {**{key: [] for key in KEYS}, "device": device, "machine": f"a {name}", **changed}
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_results_of_gpus_by_name_the_later_folder_wins(tmp_path: Path) -> None:
    write(tmp_path / "a", "h200", "cuda", seconds=1)
    write(tmp_path / "a", "l4", "cuda")
    write(tmp_path / "a", "dry", "cpu")
    write(tmp_path / "b", "h200", "cuda", seconds=2)
    found = gpu_results([tmp_path / "a", tmp_path / "b", tmp_path / "missing"])
    assert {name: result.get("seconds") for name, result in found.items()} == {"h200": 2, "l4": None}
    assert found["l4"]["machine"] == "a l4"


def test_the_current_folder_and_the_one_that_is_named_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here", "mine", "cuda")
    write(tmp_path / "named", "theirs", "cuda")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("KVLAB_GPU_RESULTS", str(tmp_path / "named"))
    assert {"mine", "theirs"} <= set(gpu_results())


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "3", '{"device": "cuda"}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu-odd.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"gpu-odd\.json is no result of `python -m kvlab bench gpu --json`"):
        gpu_results([tmp_path])


def test_without_a_result_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    lesson_11.show_results({})
    assert "no GPU result yet" in capsys.readouterr().out
