"""Notebook 11 runs both ways: as committed without the result of a GPU, and here with one beside it.

No GPU is at hand, so a run of the benchmark's steps on the CPU is given the name of a GPU. That is enough for what is
tested: that every cell runs, and shows what such a file has.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kvlab.lab.bench import gpu
from tests.harness.builder import ROOT, script
from tests.lab.bench.test_gpu import SMALL


def test_a_result_beside_the_notebook_is_shown(tmp_path: Path) -> None:
    result = gpu.run("cpu", SMALL, budget_s=600.0) | {"device": "cuda", "machine": "one GPU that nobody has"}
    (tmp_path / "gpu-mine.json").write_text(json.dumps(result), "utf-8")
    path = Path(shutil.copy(ROOT / "notebooks" / "11_gpu_benchmarks.ipynb", tmp_path))
    notebook = script.read(path)
    script.execute(notebook, path)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert outputs["results"][0]["text"].startswith("GPU result: mine on one GPU that nobody has")
    assert "measured on mine" in outputs["own"][0]["text"]
    tables = [output["data"]["text/markdown"] for output in outputs["own"] if "data" in output]
    assert [table.count("\n") - 1 for table in tables] == [
        len(result[rows]) for rows in ("roofline", "load_path", "break_even")
    ]
