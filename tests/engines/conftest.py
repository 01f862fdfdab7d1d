"""vLLM reads these variables when it is imported."""

from __future__ import annotations

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_HOST_IP="127.0.0.1", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1"
)
