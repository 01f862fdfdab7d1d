"""Where two results differ, in a few short lines: the place and both values, not two long texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

RTOL, ATOL = 1e-4, 1e-5


def same(got: Any, expected: Any) -> bool:
    """Equal; floats and tensors to a relative 1e-4, because a learner may sum in another order. NaN equals NaN.

    The floats may be in lists, tuples and dicts.
    """
    try:
        if isinstance(expected, list | tuple | dict) and type(got) is type(expected):
            return _same_parts(got, expected)
        if isinstance(expected, torch.Tensor):
            got = torch.as_tensor(got)
            return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), RTOL, ATOL, True)
        if isinstance(expected, float):
            return bool(abs(float(got) - expected) <= RTOL * max(1.0, abs(expected)))
        return bool(got == expected)
    except (TypeError, ValueError, RuntimeError):
        return False


def _same_parts(got: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], value) for key, value in expected.items())
    return len(got) == len(expected) and all(same(g, e) for g, e in zip(got, expected, strict=True))


def differences(got: Any, expected: Any) -> list[str]:
    """Lines that show both results at the place where they differ first, or in a tensor most."""
    if isinstance(expected, torch.Tensor):
        return _of_tensors(got, expected)
    if _is_plain(got) and _is_plain(expected):
        return [f"got      {got!r}", f"expected {expected!r}"]
    if isinstance(expected, bytes | str | list | tuple) and type(got) is type(expected) and len(expected) + len(got):
        return _of_sequences(got, expected)
    if isinstance(expected, dict) and isinstance(got, dict) and got.keys() == expected.keys():
        key = next((key for key in expected if not same(got[key], expected[key])), None)
        return [f"got      {short(got.get(key))} under {short(key)}", f"expected {short(expected.get(key))}"]
    kind = f" ({type(got).__name__})" if type(got) is not type(expected) else ""
    return [f"got      {short(got)}{kind}", f"expected {short(expected)}"]


def _is_plain(value: Any) -> bool:
    """Whether a value is a text that is read at a glance: a word, or a few bytes that are ASCII letters."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return isinstance(text, str) and len(text) <= 24 and text.isascii() and text.isprintable()


def short(value: Any) -> str:
    """A value in one line of at most 90 characters."""
    if isinstance(value, torch.Tensor) and value.numel() > 6:
        first = [round(float(x), 3) for x in value.flatten()[:3]]
        return f"tensor{tuple(value.shape)} beginning {first}"
    if isinstance(value, bytes) and len(value) > 16:
        return f"{len(value)} bytes: {value[:8].hex(' ')} … {value[-4:].hex(' ')}"
    if isinstance(value, list | tuple) and any(isinstance(x, bytes) and len(x) > 16 for x in value):
        return f"[{', '.join(short(x) for x in value[:2])}{', …' * (len(value) > 2)}]"
    return short_text(repr(value))


def short_text(text: str) -> str:
    """A text in one line of at most 90 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 90 else f"{text[:87]}..."


def _of_tensors(got: Any, expected: torch.Tensor) -> list[str]:
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        shape = f"shape {tuple(got.shape)}" if isinstance(got, torch.Tensor) else f"{short(got)} ({type(got).__name__})"
        return [f"got      {shape}", f"expected shape {tuple(expected.shape)}"]
    apart = (got.double() - expected.double()).abs()
    nan = int(got.isnan().sum())
    if nan:
        at = tuple(int(i) for i in got.isnan().nonzero()[0])
        return [
            f"got      NaN in {nan} of {got.numel()} places, the first at {list(at)}",
            f"expected {_at(expected, at)}",
        ]
    wrong = int((apart > ATOL + RTOL * expected.double().abs()).sum())
    at = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    where = f"at {list(at)}, the worst of {wrong} wrong places of {got.numel()}"
    digits = 4 if _at(got, at) != _at(expected, at) else 9
    return [f"got      {_at(got, at, digits)} {where}", f"expected {_at(expected, at, digits)}"]


def _at(tensor: torch.Tensor, at: tuple[int, ...], digits: int = 4) -> str:
    return f"{float(tensor[at]):.{digits}g}"


def _of_sequences(got: Sequence[Any], expected: Sequence[Any]) -> list[str]:
    """The first place that differs, and the lengths if they do."""
    pairs = zip(got, expected, strict=False)
    at = next((i for i, (g, e) in enumerate(pairs) if not same(g, e)), min(len(got), len(expected)))
    where = f"at index {at}" if max(len(got), len(expected)) > 1 else ""
    lengths = f"{len(got)} long, expected {len(expected)}" if len(got) != len(expected) else ""
    lines = [f"got      {_piece(got, at)} {where}", f"expected {_piece(expected, at)}"]
    return [line.rstrip() for line in [*lines, *([f"length   {lengths}"] if lengths else [])]]


def _piece(sequence: Sequence[Any], at: int) -> str:
    if at >= len(sequence):
        return "nothing"
    if isinstance(sequence, bytes):
        return f"{sequence[at : at + 8].hex(' ')}{' …' * (len(sequence) > at + 8)}"
    if isinstance(sequence, str):
        return short(sequence[at : at + 40])
    return short(sequence[at])
