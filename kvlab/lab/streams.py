"""What a program prints to: a terminal, a file or a pipe, in whatever encoding the surroundings chose."""

from __future__ import annotations

import io
import sys


def accept_any_text() -> None:
    """Make stdout and stderr take every character; one that their encoding lacks is printed as an escape.

    Without this, one such character ends the program: with LANG=C, in a pipe on Windows, or
    where a file name is no valid UTF-8. A stream that is closed (None), or that a notebook put
    in its place, is left as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
