"""`python -m kvlab`: see `kvlab.cli`."""

import sys

if __name__ == "__main__":
    try:
        from kvlab.cli import main

        sys.exit(main())
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "kvlab":
            raise
        sys.exit(
            f"kvlab: the Python {sys.executable} has no package {error.name}: run `make setup`, then "
            "`. .venv/bin/activate`; `python kvlab/course/doctor.py` says more"
        )
