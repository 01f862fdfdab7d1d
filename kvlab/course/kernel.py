"""The environment of a kernel whose outputs are compared: only what programs need to run, and fixed settings.

The build script, strict runs of pytest and the browser's pictures start their kernels with it. What a cell
prints must not depend on who runs it, so a list of what passes stands here, not a list of what does not: a
user's variables change warnings, hash seeds, encodings, widths, colours, time zones, threads, plots and stores.
"""

from __future__ import annotations

import os
from pathlib import Path

PASSED = (
    # where programs, their libraries, and the user's and temporary files are
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
    # without these nothing starts on Windows
    *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "USERPROFILE", "USERNAME"),
    *("APPDATA", "LOCALAPPDATA", "PROGRAMDATA", "PROGRAMFILES"),
)
"""Variables of the user that a kernel gets."""
FIXED = {"PYTHONUTF8": "1", "TZ": "UTC", "COLUMNS": "80", "LINES": "24"}
"""Where a default would come from the machine or the terminal."""
FOLDERS = {
    "KVLAB_WORK": "work",
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "matplotlib",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
}
"""Settings and answers of the user that a kernel must not find: empty folders instead."""


def kernel_environment(folder: Path, **more: str) -> dict[str, str]:
    """All variables of a kernel that is started with its outputs in mind.

    Args:
        folder: an empty folder, for this kernel alone.
        more: further variables, for who wants them on purpose.
    """
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    own = {name: str(folder / sub) for name, sub in FOLDERS.items()}
    for path in own.values():
        Path(path).mkdir(exist_ok=True)
    return {**passed, **FIXED, **own, **more}
