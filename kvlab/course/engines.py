"""Engines with environments of their own: vLLM for notebook 09, live or recorded; Ray Serve for 08, recorded."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from kvlab.course.recorded import RECORDED, Result, live_or_recorded, load_recording
from kvlab.lab.streams import accept_any_text

PYTHON = Path(__file__).resolve().parents[2] / ".venv-engines" / "bin" / "python"
NAME, RAY = "09_vllm", "08_ray"
ROUNDS = 3


def cache_argument() -> str:
    """The name of the cache argument of transformers' models: "cache" since 5.24, "past_key_values" before."""
    from kvlab.connectors.hf_models import CACHE_NAME

    return CACHE_NAME


def ray_serve() -> Result:
    """The recording of `kvlab.lab.ray_serve`. `python -m kvlab.course.recorded` makes it again, in a child process."""
    accept_any_text()
    result, machine = load_recording(RAY)
    print(f"source: recorded on {machine}")
    return result


def vllm(*parts: str) -> Result:
    """Parts of `kvlab.lab.bench.engines`, measured where `make test-engines` has made an environment, else recorded."""
    return live_or_recorded(NAME, lambda: _measured(parts), needs=str(PYTHON), called="vLLM")


def recorded_vllm() -> Result:
    """The recording of all parts. `.venv-engines/bin/python -m kvlab bench engines` measures them again."""
    accept_any_text()
    result, machine = load_recording(NAME)
    print(f"source: recorded on {machine}")
    return result


def _measured(parts: tuple[str, ...]) -> dict[str, Any]:
    program = f"import json; from kvlab.lab.bench import engines; print(json.dumps(engines.run({parts!r}, {ROUNDS})))"
    done = subprocess.run([str(PYTHON), "-c", program], check=True, capture_output=True, text=True, cwd=RECORDED)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
