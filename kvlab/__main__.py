"""`python -m kvlab` and the program `kvlab`: see `kvlab.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, see `kvlab.cli.main`.

    Raises:
        SystemExit: as there; or a package of kvlab's is not installed, with what to do.
    """
    try:
        from kvlab import cli

        return cli.main(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "kvlab":
            raise
        sys.exit(
            f"kvlab: the Python {sys.executable} has no package {error.name}: run `make setup`, then "
            "`. .venv/bin/activate`; `python kvlab/course/doctor.py` says more"
        )


if __name__ == "__main__":
    sys.exit(main())
