"""`doctor --engine transformers`: a good set-up is described, and bad ones are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import kvlab.model
from kvlab.cli import main
from kvlab.testbed.server import RedisServer

pytestmark = [pytest.mark.hf, pytest.mark.redis]

MODEL = Path(kvlab.model.__file__).parent / "pretrained"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["doctor", "--engine", "transformers", *arguments])
    return status, capsys.readouterr().out


def changed(folder: Path, file: str = "config.json", **members: object) -> str:
    """A copy of the model whose config, or other file, has other members."""
    shutil.copytree(MODEL, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **members}))
    return str(folder)


def test_a_good_set_up(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from kvlab.connectors.transformers import CachedModel

    status, text = told(capsys, "--store", redis_server.url, "--", str(MODEL))
    assert status == 0 and text.endswith("ready\n") and "problem" not in text, text
    assert "a prompt of 64 tokens" in text and "L 6, H 2, D 64" in text
    with CachedModel(AutoModelForCausalLM.from_pretrained(MODEL)) as cached:
        assert f"namespace       {cached.cache.namespace.root.hex()[:16]}\n" in text


def test_planted_faults_are_named(
    redis_server: RedisServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = ("--store", redis_server.url, "--")
    longrope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    windowed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    for says, (status, text) in {
        "Connection refused": told(capsys, "--store", "redis://127.0.0.1:9", "--", str(MODEL)),
        "nothing is shared": told(capsys, "--", str(MODEL)),
        "sliding windows": told(capsys, *url, changed(tmp_path / "window", **windowed)),
        "RoPE that depends on the position only": told(
            capsys, *url, changed(tmp_path / "rope", rope_parameters=longrope)
        ),
        "cache_implementation": told(
            capsys, *url, changed(tmp_path / "static", "generation_config.json", cache_implementation="static")
        ),
        "problem            model": told(capsys, *url, str(tmp_path / "nothing here")),
        "the folder of one model": told(capsys, *url),
    }.items():
        assert status == 1 and says in text, f"{says}:\n{text}"
        assert "Traceback" not in text and re.search(r"^problems: 1$", text, re.MULTILINE), text
