"""The results of `python -m kvlab bench gpu --json` that notebook 11 shows: those of GPUs, from named machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvlab.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
KEYS = ("device", "machine", "roofline", "limits", "break_even", "crossover", "load_path")


def gpu_results(folders: Iterable[str | Path] | None = None) -> dict[str, dict[str, Any]]:
    """Return each result of a GPU in files called gpu-NAME.json, by NAME. Dry runs on a CPU are left out.

    Args:
        folders: where to look; by default docs/results of a checkout, the current folder, and the folder that the
            environment variable KVLAB_GPU_RESULTS names. A later folder replaces a name of an earlier one.

    Raises:
        InputError: a file is not what the benchmark writes.
    """
    if folders is None:
        folders = [FOLDER, Path.cwd(), *filter(None, [os.environ.get("KVLAB_GPU_RESULTS")])]
    found = {}
    for path in (path for folder in folders for path in sorted(Path(folder).glob("gpu-*.json"))):
        result = _read(path)
        if result["device"] != "cpu":
            found[path.stem.removeprefix("gpu-")] = result
    return found


def _read(path: Path) -> dict[str, Any]:
    wrong = f"{path.name} is no result of `python -m kvlab bench gpu --json`"
    try:
        result = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{wrong}: {error}") from None
    if not isinstance(result, dict) or (missing := [key for key in KEYS if key not in result]):
        raise InputError(wrong if not isinstance(result, dict) else f"{wrong}: it has no {', '.join(missing)}")
    return result
