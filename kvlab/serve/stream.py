"""An answer that outlives its replica: it goes on elsewhere, from the prompt and the tokens that were given out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvlab.engine.requests import Busy
from kvlab.engine.workers import WorkerError
from kvlab.errors import ConfigError, InputError, KVLabError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

PAUSE_S: Final = 0.5
"""Before the second try; twice as long before each further one. Meanwhile the router learns who is gone."""


class Stream:
    """One request. Iterating over it with `async for`, once, gives its tokens, each of them once.

    Decoding is greedy, so the second replica continues as the first one would have, if the cache is lossless in the
    model's dtype. Leaving the loop early takes the request out of its replica.

    Args:
        handle: of `deploy`, or of `ray.serve.get_app_handle`.
        tries: replicas that may be lost before it gives up. A request that makes every scheduler fail costs as many.
        wait_s: the longest wait for a next token. It includes the time in queues.

    Attributes:
        tokens: the tokens that have come.
        record: the `Record` of the last replica as plain values, at the end.
        lost: replicas that were lost.

    Raises:
        ConfigError: `tries` or `wait_s` is not positive.
        InputError: the prompt is no sequence.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        prompt: Sequence[int],
        max_new_tokens: int = 32,
        stop_at_eos: bool = True,
        *,
        tries: int = 5,
        wait_s: float = 60.0,
    ) -> None:
        if type(tries) is not int or tries < 1 or not wait_s > 0:
            raise ConfigError(f"expected at least one try and a positive wait_s, got {tries!r} and {wait_s!r}")
        try:
            self._prompt = [*prompt]
        except TypeError:
            raise InputError(f"expected a sequence of tokens, got {type(prompt).__name__}") from None
        self._handle = handle
        self._limit, self._stop_at_eos = max_new_tokens, stop_at_eos
        self._tries, self._wait_s = tries, wait_s
        self.tokens: list[int] = []
        self.record: dict[str, Any] | None = None
        self.lost = 0

    async def __aiter__(self) -> AsyncIterator[int]:
        """Give the tokens.

        Raises:
            Busy: all replicas are full, and so is the queue before them.
            InputError, PoolExhausted: see `Scheduler.submit`.
            WorkerError: too many replicas were lost, or no token came in time.
        """
        while self.record is None:
            try:
                async for token in self._try():
                    yield token
            except _Lost as lost:
                self.lost += 1
                if self.lost >= self._tries:
                    raise WorkerError(f"{self.lost} replicas were lost, the last one because {lost}") from lost
                await asyncio.sleep(PAUSE_S * 2 ** (self.lost - 1))

    async def _try(self) -> AsyncIterator[int]:
        """The tokens from one replica."""
        limit = self._limit - len(self.tokens) if self.tokens else self._limit  # the replica says what is wrong with it
        parts = self._handle.options(stream=True).generate.remote(
            [*self._prompt, *self.tokens], limit, self._stop_at_eos
        )
        try:
            while self.record is None:
                part = await self._next(parts)
                for token in part["tokens"]:
                    self.tokens.append(token)
                    yield token
                self.record = part.get("record")
        finally:
            with contextlib.suppress(Exception):  # what ended the request; Ray raises it once more
                parts.cancel()

    async def _next(self, parts: Any) -> dict[str, Any]:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        try:
            async with asyncio.timeout(self._wait_s):
                part: dict[str, Any] = await anext(parts)
                return part
        except StopAsyncIteration:
            raise _Lost("it ended the answer without a record") from None
        except TimeoutError:
            raise WorkerError(f"no replica answered within {self._wait_s:g} s") from None
        except BackPressureError as error:
            raise Busy(f"all replicas are full, and so is the queue before them; try again later ({error})") from None
        except RayActorError as error:
            raise _Lost(f"it died: {type(error).__name__}") from error
        except Exception as error:
            cause = getattr(error, "cause", error)  # Ray wraps what a replica raises
            if isinstance(cause, WorkerError):
                raise _Lost(str(cause)) from error
            if isinstance(cause, KVLabError):
                raise cause from None
            raise


class _Lost(KVLabError):
    """A replica that will give no more of this answer."""
