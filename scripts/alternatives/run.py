"""Compare kvlab's replay with programs of others, and write what comes out to docs/results: `make alternatives`."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dynamo_replay
import sglang_replay
from prefix_lru import main

from kvlab.lab import tables
from kvlab.lab.machine import describe_machine

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PACKAGES = ("kvlab", "ai-dynamo-runtime", "sglang-router")
SCRIPTS = {"dynamo": dynamo_replay.measure, "router": sglang_replay.measure}


def run(file: Path) -> str:
    """Write a JSON for each script. Return all of it as tables."""
    texts = []
    for name, measure in SCRIPTS.items():
        result = {**measure(file), **_about_this_run(file)}
        target = RESULTS / f"alternatives_{name}.json"
        target.write_text(json.dumps(result, indent=2) + "\n")
        texts.append(f"{target.relative_to(Path.cwd())}\n{tables.text(result)}")
    return "\n\n".join(texts)


def _about_this_run(file: Path) -> dict[str, Any]:
    return {
        "trace": {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


if __name__ == "__main__":
    main(run)
