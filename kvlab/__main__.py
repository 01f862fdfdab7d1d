"""`python -m kvlab`: see `kvlab.cli`."""

import sys

from kvlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
