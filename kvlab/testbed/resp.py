"""Finds the ends of the values in a RESP stream."""

from __future__ import annotations

LINE_BYTES = 64 * 1024  # a longer line is not RESP


class Splitter:
    """Finds the ends of RESP values (replies or commands) in a stream that arrives in arbitrary pieces.

    After bytes that are not RESP, for example TLS, no further ends are found.
    """

    AGGREGATES = {b"*": 1, b"~": 1, b">": 1, b"%": 2, b"|": 2}
    BULKS = (b"$", b"=", b"!")
    SIMPLE = (b"+", b"-", b":", b"_", b",", b"#", b"(")

    def __init__(self) -> None:
        self.between = True  # no value is incomplete
        self._values = 1  # values that are missing until the outermost value is complete
        self._skip = 0  # bytes that are missing of a bulk string and its line end
        self._line = b""
        self._invalid = False  # the stream is not RESP

    def split(self, data: bytes) -> list[tuple[bytes, bool]]:
        """Divide `data` into pieces. Each piece has a flag: whether a value ends after the piece."""
        pieces, start, at = [], 0, 0
        while at < len(data) and not self._invalid:
            at = self._step(data, at)
            if self._values == 0 and self._skip == 0:
                pieces.append((data[start:at], True))
                start, self._values = at, 1
        self.between = start == len(data) if data else self.between
        if start < len(data):
            pieces.append((data[start:], False))
        return pieces

    def _step(self, data: bytes, at: int) -> int:
        """Consume one line or the available part of a bulk string. Returns the position of its end."""
        if self._skip:
            taken = min(self._skip, len(data) - at)
            self._skip -= taken
            return at + taken
        end = data.find(b"\n", at) + 1 or len(data)
        self._line += data[at:end]
        self._invalid = len(self._line) > LINE_BYTES
        if self._line.endswith(b"\r\n"):
            self._header(self._line[:1], self._line[1:-2])
            self._line = b""
        return end

    def _header(self, kind: bytes, text: bytes) -> None:
        self._values -= kind != b"|"  # an attribute precedes its value
        if kind in self.SIMPLE:
            return
        try:
            length = int(text)
        except ValueError:
            length = -2
        if length < -1 or kind not in (*self.BULKS, *self.AGGREGATES):
            self._invalid = True
        elif kind in self.BULKS:
            self._skip = length + 2 if length >= 0 else 0
        else:
            self._values += max(length, 0) * self.AGGREGATES[kind]
