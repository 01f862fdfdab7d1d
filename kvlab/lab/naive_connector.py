"""A connector for vLLM as one would write it first. It poisons the store; lesson 09 and a test show how.

It loads in the step that computes the rest of the prompt. vLLM does not stop this step when a load fails: what it
computes on top of the missing block is wrong, and this connector saves it, with a valid checksum. The engine itself
answers right, because it computes the request again. A later engine believes the store.
"""

from __future__ import annotations

from typing import Any

from kvlab.connectors.vllm import KVLabConnector


class NaiveConnector(KVLabConnector):
    """`KVLabConnector` with synchronous loads."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Promise the blocks for this step."""
        return super().get_num_new_matched_tokens(request, num_computed_tokens)[0], False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load them, and wait."""
        waiting = {blocks.request for blocks in self._work.loads}
        super().start_load_kv(forward_context, **kwargs)
        while waiting:
            waiting -= self.worker.finished()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Nothing is asynchronous here."""
        return None, None
