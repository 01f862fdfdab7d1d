"""A model folder to change at will, and a memory of digests that is not the user's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvlab.model import PRETRAINED, digests
from tests.harness.helpers import build_model, save_folder


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digests are remembered here, never in the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvlab"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small tied model with the shipped tokenizer, on disk."""
    made = save_folder(build_model(), tmp_path / "model")
    shutil.copy(PRETRAINED / "tokenizer.json", made)
    return made


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once: the memory of digests works without waiting for seconds."""
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
