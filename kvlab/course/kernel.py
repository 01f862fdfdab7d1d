"""Environment of a kernel whose outputs are compared: the variables that programs need, and fixed settings.

The build script, strict runs of pytest and the browser screenshots start their kernels in this environment.
The outputs of a cell must not depend on the user. The user's variables can change warnings, hash seeds,
encodings, widths, colours, time zones, threads, plots and stores. This module therefore lists the variables
that are passed on, not the variables that are removed.
"""

from __future__ import annotations

import os
from pathlib import Path

PASSED = (
    # locations of programs, libraries, the user's files and temporary files
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
    # programs do not start on Windows without these
    *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "USERPROFILE", "USERNAME"),
    *("APPDATA", "LOCALAPPDATA", "PROGRAMDATA", "PROGRAMFILES"),
)
"""The user's variables that are passed on to a kernel."""
FIXED = {"PYTHONUTF8": "1", "TZ": "UTC", "COLUMNS": "80", "LINES": "24"}
"""Settings whose default would depend on the machine or the terminal."""
FOLDERS = {
    "KVLAB_WORK": "work",
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "matplotlib",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
}
"""Variables that name empty folders, so that a kernel does not find the user's settings and answers."""


def kernel_environment(folder: Path, **more: str) -> dict[str, str]:
    """All environment variables of a kernel whose outputs are compared.

    Args:
        folder: an empty folder for this kernel alone.
        more: further variables.
    """
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    own = {name: str(folder / sub) for name, sub in FOLDERS.items()}
    for path in own.values():
        Path(path).mkdir(exist_ok=True)
    return {**passed, **FIXED, **own, **more}
