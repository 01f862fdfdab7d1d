"""How a learner's function is called: for a limited time, and without the operations that the exercise asks for."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

SECONDS = 10.0
"""How long one call may take. The slowest reference takes a hundredth of it."""


class TooLong(Exception):
    """The call did not return in time."""


class Forbidden(Exception):
    """The call used a torch operation that the exercise asks the learner to write."""


class _Stop(BaseException):
    """Raised inside a call that takes too long. No `except Exception` in a learner's loop catches it."""


class _Watch(TorchFunctionMode):
    """Raises for torch operations whose name has `part` in it, by whatever name the caller knows them."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", func))
        if self._part in name:
            raise Forbidden(name)
        return func(*args, **(kwargs or {}))


def call(function: Callable[..., Any], args: tuple[Any, ...], forbidden: str = "", seconds: float = SECONDS) -> Any:
    """Call `function(*args)` in a thread of its own and return what it returns.

    Args:
        forbidden: a part of the name of torch operations that it must not use; "" for none.

    Raises:
        TooLong: it did not return in `seconds`.
        Forbidden: it used a forbidden operation.
        Exception: whatever the function raised.
    """
    returned: list[Any] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            if forbidden:
                with _Watch(forbidden):
                    returned.append(function(*args))
            else:
                returned.append(function(*args))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="kvlab exercise", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also when the learner interrupts the cell
        if thread.is_alive():
            _stop(thread)
    if returned:
        return returned[0]
    if not raised or isinstance(raised[0], _Stop):
        raise TooLong
    if isinstance(raised[0], Exception):
        raise raised[0]
    raise RuntimeError(f"{type(raised[0]).__name__} ended the call") from raised[0]  # SystemExit, say


def _stop(thread: threading.Thread) -> None:
    """Raise `_Stop` in a thread. One that is inside a C function sees it when that returns."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stop))
    thread.join(1.0)
