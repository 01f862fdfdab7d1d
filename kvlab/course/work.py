"""The folder of a learner's files: answers (`mykv.py`) and guesses."""

from __future__ import annotations

import os
from pathlib import Path


def work_dir() -> Path:
    """The learner's folder.

    The folder is `KVLAB_WORK` if set. In the project's folder, it is `work` in it; in `notebooks`, it is
    `work` beside it. Otherwise it is the current folder; `make lab` starts JupyterLab in `work`.
    """
    if named := os.environ.get("KVLAB_WORK"):
        return Path(named)
    here = Path.cwd()
    if (here / "notebooks" / "course.toml").is_file():
        return here / "work"
    return here.parent / "work" if here.name == "notebooks" else here
