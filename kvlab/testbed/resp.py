"""Where the values of a RESP stream end."""

from __future__ import annotations

LINE_BYTES = 64 * 1024  # no header of RESP is longer


class Splitter:
    """Finds where RESP values (replies, or commands) end in a stream, whatever pieces it comes in.

    A stream that is not RESP (TLS, nonsense) has no ends from there on.
    """

    AGGREGATES = {b"*": 1, b"~": 1, b">": 1, b"%": 2, b"|": 2}
    BULKS = (b"$", b"=", b"!")
    SIMPLE = (b"+", b"-", b":", b"_", b",", b"#", b"(")

    def __init__(self) -> None:
        self.between = True  # no value has begun that has not ended
        self._values = 1  # still to come, until the outermost one is whole
        self._skip = 0  # of a bulk string and its line end
        self._line = b""
        self._lost = False

    def split(self, data: bytes) -> list[tuple[bytes, bool]]:
        """`data` in pieces, each with whether a value ends there."""
        pieces, start, at = [], 0, 0
        while at < len(data) and not self._lost:
            at = self._step(data, at)
            if self._values == 0 and self._skip == 0:
                pieces.append((data[start:at], True))
                start, self._values = at, 1
        self.between = start == len(data) if data else self.between
        if start < len(data):
            pieces.append((data[start:], False))
        return pieces

    def _step(self, data: bytes, at: int) -> int:
        """Take one line, or what is there of a bulk string. Returns where it ends."""
        if self._skip:
            taken = min(self._skip, len(data) - at)
            self._skip -= taken
            return at + taken
        end = data.find(b"\n", at) + 1 or len(data)
        self._line += data[at:end]
        self._lost = len(self._line) > LINE_BYTES
        if self._line.endswith(b"\r\n"):
            self._header(self._line[:1], self._line[1:-2])
            self._line = b""
        return end

    def _header(self, kind: bytes, text: bytes) -> None:
        self._values -= kind != b"|"  # attributes come before the value that they belong to
        if kind in self.SIMPLE:
            return
        try:
            length = int(text)
        except ValueError:
            length = -2
        if length < -1 or kind not in (*self.BULKS, *self.AGGREGATES):
            self._lost = True
        elif kind in self.BULKS:
            self._skip = length + 2 if length >= 0 else 0
        else:
            self._values += max(length, 0) * self.AGGREGATES[kind]
