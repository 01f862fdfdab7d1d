"""A stream that goes on elsewhere, over replicas that are scripted. It needs Ray for its errors, but starts none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kvlab.engine.requests import Busy
from kvlab.engine.workers import WorkerError
from kvlab.errors import ConfigError, InputError
from kvlab.serve import stream
from kvlab.serve.stream import Stream

pytestmark = pytest.mark.ray
RECORD = {"reason": "length"}


class Handle:
    """Answers with the next number after the prompt, and so on; each script is cut off where it says."""

    def __init__(self, *scripts):
        self.scripts, self.calls, self.cancelled = list(scripts), [], 0
        self.generate = SimpleNamespace(remote=self._remote)

    def options(self, stream):
        assert stream
        return self

    def _remote(self, prompt, limit, stop_at_eos):
        self.calls.append((list(prompt), limit))
        answer = list(range(prompt[-1] + 1, prompt[-1] + 1 + limit)) if prompt and isinstance(limit, int) else []
        return Parts(self, answer, self.scripts.pop(0))


class Parts:
    def __init__(self, handle, answer, script):
        self.handle, self.answer, self.script = handle, answer, script

    def cancel(self):
        self.handle.cancelled += 1
        raise RuntimeError("Ray raises here what has ended the request")

    async def __anext__(self):
        await asyncio.sleep(0)
        step = self.script.pop(0) if self.script else len(self.answer)
        if isinstance(step, float):
            await asyncio.sleep(step)
        if isinstance(step, BaseException):
            raise step
        part = {"tokens": self.answer[: int(step)]}
        self.answer = self.answer[int(step) :]
        return part if self.answer else {**part, "record": RECORD}


def died():
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def wrapped(error):
    from ray.exceptions import RayTaskError

    return RayTaskError("generate", "traceback", error).as_instanceof_cause()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(stream, "PAUSE_S", 0.001)


async def whole(one):
    return [token async for token in one]


def test_one_replica_that_lives():
    handle = Handle([1, 2])
    one = Stream(handle, [9], 6)
    assert asyncio.run(whole(one)) == one.tokens == [10, 11, 12, 13, 14, 15]
    assert (one.record, one.lost, handle.cancelled) == (RECORD, 0, 1)


def test_after_a_death_it_goes_on_from_what_was_given_out():
    handle = Handle([2, 1, died()], [died()], [3])
    one = Stream(handle, [9], 8)
    assert asyncio.run(whole(one)) == list(range(10, 18))
    assert handle.calls == [([9], 8), ([9, 10, 11, 12], 5), ([9, 10, 11, 12], 5)]
    assert (one.lost, handle.cancelled) == (2, 3)


def test_a_replica_that_says_it_failed_is_left():
    one = Stream(Handle([1, wrapped(WorkerError("a step failed"))], []), [9], 3)
    assert asyncio.run(whole(one)) == [10, 11, 12] and one.lost == 1


def test_it_gives_up_after_so_many_replicas():
    handle = Handle([1, died()], [1, died()], [1, died()], [])
    one = Stream(handle, [9], 8, tries=3)
    with pytest.raises(WorkerError, match="3 replicas were lost, the last one because it died: ActorDiedError"):
        asyncio.run(whole(one))
    assert one.tokens == [10, 11, 12] and len(handle.calls) == 3


def test_errors_of_the_caller_are_kvlabs_own_and_are_not_tried_again():
    from ray.serve.exceptions import BackPressureError

    for raised, expected in (
        (wrapped(InputError("an empty prompt")), InputError),
        (wrapped(Busy("many wait")), Busy),
        (BackPressureError(3, 3), Busy),
    ):
        handle = Handle([raised])
        with pytest.raises(expected) as caught:
            asyncio.run(whole(Stream(handle, [9], 8)))
        assert type(caught.value) is expected and len(handle.calls) == handle.cancelled == 1


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(whole(Stream(Handle([ZeroDivisionError()]), [9], 8)))


def test_no_token_in_time_is_an_error_and_the_request_is_cancelled():
    handle = Handle([1, 30.0])
    with pytest.raises(WorkerError, match=r"no replica answered within 0.05 s"):
        asyncio.run(whole(Stream(handle, [9], 8, wait_s=0.05)))
    assert handle.cancelled == 1


def test_an_end_without_a_record_is_a_lost_replica():
    one = Stream(Handle([1, StopAsyncIteration()], []), [9], 3)
    assert asyncio.run(whole(one)) == [10, 11, 12] and one.lost == 1


def test_leaving_the_loop_cancels_the_request():
    handle = Handle([1, 1, 1])

    async def leave():
        async for _ in Stream(handle, [9], 8):
            break
        await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert handle.cancelled == 1


@pytest.mark.parametrize("options", [{"tries": 0}, {"tries": True}, {"wait_s": 0}, {"wait_s": float("nan")}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(ConfigError):
        Stream(Handle(), [9], **options)


def test_a_prompt_that_is_no_sequence():
    with pytest.raises(InputError, match="NoneType"):
        Stream(Handle(), None)
