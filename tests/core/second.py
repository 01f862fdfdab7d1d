"""Keys, fingerprints and digests once more, written from the text of `kvlab.core.keys` alone."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any


def field2(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def sha2(*fields: bytes) -> bytes:
    return hashlib.sha256(b"".join(field2(f) for f in fields)).digest()


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def root2(print_: bytes, precision: str, salt: bytes, B: int) -> bytes:
    return sha2(b"kvlab/1/root", print_, precision.encode(), salt, u32(B))


def keys2(print_: bytes, precision: str, salt: bytes, B: int, tokens: list[int]) -> list[bytes]:
    key, keys = root2(print_, precision, salt, B), []
    for i in range(len(tokens) // B):
        key = sha2(b"kvlab/1/block", key, u32(*tokens[i * B : (i + 1) * B]))
        keys.append(key)
    return keys


def text_key2(prefix: str, layer: int, precision: str, salt: bytes, print_: bytes) -> bytes:
    return sha2(b"kvlab/1/text", print_, precision.encode(), salt, prefix.encode("utf-8"), u32(layer))


def fingerprint2(config: dict[str, Any], weights: bytes, tokenizer: bytes, adapter: bytes, dtype: str) -> bytes:
    text = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    return sha2(b"kvlab/1/fingerprint", text, weights, tokenizer, adapter, dtype.encode(), u32(1))


def weights2(tensors: list[tuple[str, str, tuple[int, ...], bytes]]) -> bytes:
    """From the text of `digest_tensors`: names, dtypes, shapes (u64) and the hash of the bytes, sorted."""
    entries = [
        field2(name.encode()) + field2(dtype.encode()) + field2(struct.pack(f"<{len(shape)}Q", *shape))
        + hashlib.sha256(data).digest()
        for name, dtype, shape, data in tensors
    ]  # fmt: skip
    return sha2(b"kvlab/1/weights", *sorted(entries))


def json2(value: Any) -> str:
    """JSON with sorted keys and no spaces, all but printable ASCII escaped as UTF-16 units."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json2(key)}:{json2(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(json2, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(map(escaped2, value)) + '"'
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def escaped2(char: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\b": "\\b"}
    if char in short or " " <= char <= "~":
        return short.get(char, char)
    units = char.encode("utf-16-be").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def tokenizer2(text: str) -> bytes:
    content = {k: v for k, v in json.loads(text).items() if k not in ("version", "truncation", "padding")}
    return sha2(b"kvlab/1/tokenizer", json2(content).encode())
