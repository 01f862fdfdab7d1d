"""Where this repository is published: the one setting is `[project.urls]` in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
URL: Final[str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
NAME: Final = URL.removeprefix("https://github.com/")
"""OWNER/NAME, as Colab and pip want it."""
BLOB: Final = f"{URL}/blob/main/"
"""What links to files begin with."""
TREE: Final = f"{URL}/tree/main/"
"""What links to folders begin with."""
