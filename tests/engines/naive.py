"""A connector as one would write it first: loads happen in the step that computes the rest of the prompt."""

from __future__ import annotations

from typing import Any

from kvlab.connectors.vllm import KVLabConnector


class NaiveConnector(KVLabConnector):  # type: ignore[misc]
    """Loads synchronously, and saves what a step computed on top of a load that failed in the same step."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return super().get_num_new_matched_tokens(request, num_computed_tokens)[0], False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        waiting = {blocks.request for blocks in self._work.loads}
        super().start_load_kv(forward_context, **kwargs)
        while waiting:
            waiting -= self.worker.finished()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, None
