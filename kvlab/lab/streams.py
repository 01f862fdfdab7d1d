"""The program's output streams (terminal, file or pipe), which may have any encoding."""

from __future__ import annotations

import io
import sys


def accept_any_text() -> None:
    """Make stdout and stderr accept every character; characters outside their encoding are printed as escapes.

    Without this, such a character raises UnicodeEncodeError, for example with LANG=C, in a pipe on
    Windows, or in a file name that is not valid UTF-8. Streams that are closed (None) or that a
    notebook has replaced do not change.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
