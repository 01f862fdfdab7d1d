"""Where vLLM is installed, its environment is set before a test module imports it."""

from __future__ import annotations

from importlib.util import find_spec

from kvlab.lab.engines import prepare

if find_spec("vllm") is not None:
    prepare()
