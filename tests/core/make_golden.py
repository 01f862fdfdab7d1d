"""Makes the committed test vectors and golden records: `python -m tests.core.make_golden`.

They pin version 1 of keys and records. A file that exists is never made again: another content
would be a change of format, which needs a new version number, not a new file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from kvlab.core import record
from kvlab.core.codecs import CODECS
from kvlab.core.keys import Namespace, text_key
from kvlab.core.precisions import PRECISIONS
from kvlab.core.record import Format
from kvlab.core.seals import AesGcm, Seal, Xxh3
from kvlab.model import Llama
from kvlab.model.fingerprint import digest_tensors
from kvlab.model.fingerprint import fingerprint_of_model as fingerprint
from tests.harness.helpers import build_model, joined

HERE = Path(__file__).parent
VECTORS, GOLDEN = HERE / "vectors.json", HERE / "golden"
GOLDEN_KEY = bytes(range(32))
SEALS: dict[str, Seal] = {"": Xxh3(), "-aes": AesGcm({7: bytes(range(32, 64))}, b"tenant")}
GOLDEN_FORMATS = {
    f"{precision}-{codec}{name}": Format(precision, codec, seal)
    for precision in PRECISIONS
    for codec in CODECS
    for name, seal in SEALS.items()
}


def golden_tensor() -> torch.Tensor:
    """[L, P, H, B, D] = [2, 2, 1, 4, 3] of values that every floating precision holds exactly."""
    return (torch.arange(48).reshape(2, 2, 1, 4, 3) - 24).float() / 8


def plain_weights() -> dict[str, torch.Tensor]:
    """Weights that need no random numbers."""
    return {
        "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a.weight": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
        "c.scale": torch.tensor(0.5, dtype=torch.float16),
    }


def plain_model(**changes: Any) -> Llama:
    """A model in memory whose weights are a count."""
    model = build_model(heads=2, kv_heads=1, head_dim=4, layers=1, vocab=5, hidden=8, **changes)
    for i, (_, weight) in enumerate(sorted(model.named_parameters())):
        weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) / 64 + i)
    return model


def namespace_vectors() -> list[dict[str, Any]]:
    cases = [
        (bytes(32), "fp32", b"", 2, [1, 2, 3, 4, 5]),
        (bytes(range(32)), "fp16", b"tenant", 4, [0, 2**32 - 1, 65536, 255, 7, 8, 9, 10]),
        (b"\xff" * 32, "bf16", "Mieter ü".encode(), 16, list(range(1000, 1033))),
        (b"\xff" * 32, "int8", b"", 64, [7] * 63),
    ]
    vectors = []
    for print_, precision, salt, B, tokens in cases:
        ns = Namespace(print_, precision, salt, B)
        inputs = {"fingerprint": print_.hex(), "precision": precision, "salt": salt.hex(), "B": B, "tokens": tokens}
        vectors.append({**inputs, "root": ns.root.hex(), "keys": [key.hex() for key in ns.keys(tokens)]})
    return vectors


def text_vectors() -> list[dict[str, Any]]:
    cases = [
        ("def main():", 0, "fp16", b"", b""),
        ("größer 🙂", 31, "fp32", b"salt", bytes(32)),
        (" ", 2**32 - 1, "bf16", b"", bytes(range(32))),
    ]
    return [
        {
            **{"prefix": prefix, "layer": layer, "precision": precision, "salt": salt.hex(), "fingerprint": p.hex()},
            "key": text_key(prefix, layer, precision, salt, p).hex(),
        }
        for prefix, layer, precision, salt, p in cases
    ]


def main() -> None:
    vectors = {
        "namespaces": namespace_vectors(),
        "texts": text_vectors(),
        "plain_weights": digest_tensors(plain_weights().items()).hex(),
        "plain_model": fingerprint(plain_model()).hex(),
        "plain_model_with_adapter": fingerprint(plain_model(), adapter=b"lora").hex(),
        "plain_model_untied": fingerprint(plain_model(tied=False)).hex(),
    }
    text = json.dumps(vectors, indent=1, ensure_ascii=False)
    keep(VECTORS, re.sub(r"\n\s+(\d+,?|\](?=,\n   \"root))", r" \1", text).encode() + b"\n")  # numbers in one line
    GOLDEN.mkdir(exist_ok=True)
    for name, fmt in GOLDEN_FORMATS.items():
        keep(GOLDEN / f"{name}.bin", joined(record.encode(golden_tensor(), GOLDEN_KEY, fmt)))
    for precision in ("int8", "int4"):
        value = joined(record.encode(golden_tensor(), GOLDEN_KEY, Format(precision)))
        rounded = record.decode(value, GOLDEN_KEY, Format(precision), golden_tensor().shape)
        keep(GOLDEN / f"{precision}.expected", rounded.numpy().astype("<f4").tobytes())


def keep(path: Path, content: bytes) -> None:
    """Write a file once."""
    if not path.exists():
        path.write_bytes(content)


if __name__ == "__main__":
    main()
