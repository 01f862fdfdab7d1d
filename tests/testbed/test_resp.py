"""The ends of RESP values are found, whatever pieces the stream comes in, and there are none in what is not RESP."""

from __future__ import annotations

import pytest

from kvlab.testbed.resp import Splitter
from tests.harness.talk import WORDS


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_ends_of_replies_are_found_in_pieces_of_any_size(size: int) -> None:
    small = [b"_\r\n", b"=5\r\ntxt:a\r\n", b"*-1\r\n", b"$0\r\n\r\n", b"*0\r\n", b"-ERR $3\r\n"]
    nested = [b"%1\r\n+a\r\n:1\r\n", b"|1\r\n+a\r\n:1\r\n+b\r\n", b">2\r\n+a\r\n~1\r\n#t\r\n"]
    values = [*WORDS, *small, *nested, *WORDS]
    stream, splitter, ends, at = b"".join(values), Splitter(), [], 0
    for start in range(0, len(stream), size):
        for piece, end in splitter.split(stream[start : start + size]):
            at += len(piece)
            ends += [at] if end else []
    assert ends == [len(b"".join(values[: i + 1])) for i in range(len(values))]
    assert splitter.between


@pytest.mark.parametrize("stream", [b"HTTP/1.1 400\r\n+OK\r\n", b"$x\r\n+OK\r\n", bytes(100_000) + b"\r\n+OK\r\n"])
def test_what_is_not_resp_has_no_ends(stream: bytes) -> None:
    splitter = Splitter()
    assert splitter.split(stream[:50]) + splitter.split(stream[50:]) + splitter.split(b"+OK\r\n")
    assert not any(ends for _, ends in splitter.split(b"+OK\r\n"))
