"""Prompts of the engine tests."""

from __future__ import annotations

from pathlib import Path

import kvlab.model

TEXT = (Path(kvlab.model.__file__).parent / "heldout.txt").read_text("utf-8")
PROMPTS = [TEXT[:1200], TEXT[2000:3500], TEXT[:600] + TEXT[7000:8000]]
