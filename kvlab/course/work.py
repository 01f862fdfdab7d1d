"""Where a learner's own files are: answers (`mykv.py`), guesses, plots they keep."""

from __future__ import annotations

import os
from pathlib import Path


def work_dir() -> Path:
    """The learner's folder.

    `KVLAB_WORK` if that is set; else `work/` beside the course's `notebooks/`; else the current
    folder, which is `work/` for a JupyterLab that `make lab` opened.
    """
    if named := os.environ.get("KVLAB_WORK"):
        return Path(named)
    here = Path.cwd()
    return here.parent / "work" if here.name == "notebooks" else here
