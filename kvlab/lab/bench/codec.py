"""Size, speed and quality loss of each codec on KV of the shipped model.

    python -m kvlab bench codec --json

The KV is computed from the held-out text and divided into records of 64 tokens, as in the cache.
Sizes compare a whole record with the same block in fp32. Speeds count every block with its fp16
size, so that codecs can be compared. Encoding goes from an fp32 block to a sealed record, decoding
from the record to an fp32 block of a larger KV tensor. Both run in one thread.

For the quality, 1,024 tokens of KV are encoded and decoded. Then the model reads 64 further tokens
of the text, and its predictions are compared with its predictions after the original KV:

    kl             mean KL divergence in nats per token; kl_se: its standard error over the windows
    ppl_delta_pct  change of perplexity in percent
    top1           share of tokens for which the most likely next token stays the same
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from kvlab.core import record
from kvlab.core.codecs import CODECS
from kvlab.core.precisions import PRECISIONS
from kvlab.core.record import Format
from kvlab.core.seals import AesGcm
from kvlab.errors import KVLabError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.quality import windows as windows_of
from kvlab.lab.reachable import open_reachable
from kvlab.lab.timing import Timings, time_rounds
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.stores import Store

PREFIX, SUFFIX, B = 1024, 64, 64
KEY = bytes(32)
GZIP = "fp16+gzip"
"""Baseline of the compressed codecs: float32 -> float16 -> gzip."""

ABOUT = (
    "rows: how many times smaller than fp32 a record is, GB/s with the block counted as fp16, and the change of "
    "predictions (kl in nats per token, ppl_delta_pct in percent, top1: share of tokens with the same most likely "
    f"next token); against_gzip: how many times as fast as {GZIP}; seal: time to encode a whole record, compared with "
    "the checksum of its bytes"
)

Row = dict[str, Any]
Through = Callable[[Tensor], Tensor]
"""Returns a block [L, P, H, B, D] as it is after encoding and decoding."""


@dataclass(frozen=True)
class Sample:
    """Prefix KV of some windows of the held-out text, and the model's predictions after this prefix.

    Attributes:
        rows: tokens, int64 [W, PREFIX + SUFFIX + 1].
        kv: [W, L, P, H, PREFIX, D].
        logs: log-probabilities after the original KV, [W, SUFFIX, vocabulary].
    """

    model: Llama
    rows: Tensor
    kv: Tensor
    logs: Tensor

    def blocks(self, count: int) -> list[Tensor]:
        """`count` contiguous blocks [L, P, H, B, D], evenly spread over the windows."""
        W, per = self.kv.shape[0], PREFIX // B
        chosen = [divmod(round(i * (W * per - 1) / max(1, count - 1)), per) for i in range(count)]
        return [self.kv[w, :, :, :, b * B : (b + 1) * B].contiguous() for w, b in chosen]


@torch.inference_mode()
def sample(count: int = 96) -> Sample:
    """Run the shipped model over `count` evenly spaced windows of the held-out text."""
    model = load_model()
    rows = windows_of(held_out_tokens(Tokenizer()), count, PREFIX + SUFFIX + 1)
    kvs, logs = [], []
    for row in rows:
        kv = model.new_kv(PREFIX)
        model(row[None, :PREFIX], kv, last_only=True)
        kvs.append(kv[:, :, 0].clone())
        logs.append(_predict(model, kvs[-1], row))
    return Sample(model, rows, torch.stack(kvs), torch.stack(logs))


def quality(s: Sample, through: Through) -> tuple[Row, list[float]]:
    """The quality measures that the module's docstring defines, and the top-1 agreement of each window."""
    kls, tops, losses = [], [], []
    for row, kv, exact in zip(s.rows, s.kv, s.logs, strict=True):
        read = torch.cat([through(block) for block in kv.split(B, dim=3)], dim=3)
        logs = _predict(s.model, read, row)
        target = row[PREFIX + 1 :, None]
        kls.append(float((exact.exp() * (exact - logs)).sum(-1).mean()))
        tops.append(float((exact.argmax(-1) == logs.argmax(-1)).float().mean()))
        losses.append(float((exact - logs).gather(1, target).mean()))
    found = {
        "kl": statistics.fmean(kls),
        "kl_se": _standard_error(kls),
        "ppl_delta_pct": 100 * math.expm1(statistics.fmean(losses)),
        "top1": statistics.fmean(tops),
    }
    return found, tops


def run(windows: int = 96, blocks: int = 96, rounds: int = 5, store: str | None = None) -> Row:
    """Measure all codecs and, with the URL of a store, the transfer of raw fp32 records to and from this store."""
    if store is None:
        return _run(windows, blocks, rounds, None)
    with open_reachable(store, ttl_s=60) as reached:  # checked first, because the rest takes minutes
        return _run(windows, blocks, rounds, reached)


def _run(windows: int, blocks: int, rounds: int, store: Store | None) -> Row:
    s = sample(windows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, times = _speeds(s.blocks(blocks), rounds)
    finally:
        torch.set_num_threads(threads)
    by_precision = {p: quality(s, _through(Format(p))) for p in PRECISIONS}
    for row in rows:
        row.update(by_precision[row["codec"].split("+")[0]][0])
    return {
        "about": ABOUT,
        "rows": rows,
        "against_gzip": [_against_gzip(r, times) for r in rows if r["codec"].endswith(("+zstd", "+gzip"))],
        "reference": _reference(s, by_precision["int4"][1]),
        "seal": [_seal(s.blocks(blocks), rounds), _seal(list(torch.randn(blocks, 1 << 18)), rounds)],
        "wire": _wire(s.blocks(16), store, rounds) if store else None,
        "windows": windows,
        "aa_ratio": times.aa_ratio,
        "noisy": times.noisy,
        "machine": describe_machine(),
        "versions": versions(),
    }


def _formats() -> dict[str, Format]:
    plain = {p + ("" if c == "raw" else f"+{c}"): Format(p, c) for p in PRECISIONS for c in CODECS}
    seal = AesGcm({1: bytes(32)})
    return plain | {f"{p}+{c}+aes": Format(p, c, seal) for p, c in (("fp32", "raw"), ("int8", "zstd"))}


@torch.inference_mode()
def _predict(model: Llama, kv: Tensor, row: Tensor) -> Tensor:
    """Log-probabilities [SUFFIX, vocabulary] of the next token for each token after the prefix."""
    room = model.new_kv(PREFIX + SUFFIX)
    room[:, :, 0, :, :PREFIX] = kv
    return F.log_softmax(model(row[None, PREFIX:-1], room, PREFIX)[0].float(), dim=-1)


def _through(fmt: Format) -> Through:
    def through(block: Tensor) -> Tensor:
        value = b"".join(record.encode(block, KEY, fmt))
        return record.decode(value, KEY, fmt, block.shape)

    return through


def _speeds(blocks: Sequence[Tensor], rounds: int) -> tuple[list[Row], Timings]:
    formats = _formats()
    values = {name: [b"".join(record.encode(b, KEY, f)) for b in blocks] for name, f in formats.items()}
    out = torch.empty(*blocks[0].shape[:3], PREFIX, blocks[0].shape[4])[:, :, :, :B]
    halves = [b.to(torch.float16).numpy() for b in blocks]
    room = np.empty_like(halves[0])

    def memcpy() -> None:
        for h in halves:
            np.copyto(room, h)

    work: dict[str, Callable[[], object]] = {
        "memcpy": memcpy,
        "cast": lambda: [b.to(torch.float16) for b in blocks],
    }
    for name, fmt in formats.items():
        work[f"encode {name}"] = _encoder(blocks, fmt)
        work[f"decode {name}"] = _decoder(values[name], fmt, out)
    times = time_rounds(work, rounds)
    payload = 2 * blocks[0].numel() * len(blocks)

    def gbps(name: str) -> float:
        return payload / times.median_ms(name) / 1e6

    rows = [
        {
            "codec": name,
            "x_fp32": 2 * payload / sum(map(len, values[name])),
            "encode_gbps": gbps(f"encode {name}"),
            "decode_gbps": gbps(f"decode {name}"),
            "fp16_cast_gbps": gbps("cast"),
            "memcpy_gbps": gbps("memcpy"),
        }
        for name in formats
    ]
    return rows, times


def _encoder(blocks: Sequence[Tensor], fmt: Format) -> Callable[[], object]:
    return lambda: [record.encode(b, KEY, fmt) for b in blocks]


def _decoder(values: Sequence[bytes], fmt: Format, out: Tensor) -> Callable[[], object]:
    return lambda: [record.decode(v, KEY, fmt, out.shape, out=out) for v in values]


def _against_gzip(row: Row, times: Timings) -> Row:
    name = row["codec"]
    return {
        "codec": name,
        "encode_x": times.ratio(f"encode {GZIP}", f"encode {name}"),
        "decode_x": times.ratio(f"decode {GZIP}", f"decode {name}"),
    }


def _reference(s: Sample, tops: Sequence[float]) -> Row:
    """int4, compared with a reference quantiser: 16 levels for both planes, fp16 scales and minima."""
    found, reference_tops = quality(s, _reference_int4)
    paired = [a - b for a, b in zip(tops, reference_tops, strict=True)]
    return {
        "codec": "int4, 16 levels of both planes, fp16 scales and minima",
        **found,
        "int4_top1_minus_this": statistics.fmean(paired),
        "int4_top1_minus_this_se": _standard_error(paired),
    }


def _reference_int4(block: Tensor) -> Tensor:
    keys, values = block[:, 0].transpose(2, 3), block[:, 1]
    return torch.stack([_asymmetric(keys).transpose(2, 3), _asymmetric(values)], dim=1)


def _asymmetric(x: Tensor) -> Tensor:
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / 15).half().float()
    low = low.half().float()
    return ((x - low) / scale.clamp(min=1e-12)).round().clamp(0, 15) * scale + low


def _seal(blocks: Sequence[Tensor], rounds: int) -> Row:
    """Time to encode a raw fp32 record, compared with the checksum of its bytes alone."""
    raw = [b.numpy().reshape(-1).view(np.uint8).data for b in blocks]
    times = time_rounds(
        {
            "xxh3": lambda: [xxhash.xxh3_64_intdigest(r) for r in raw],
            "encode": lambda: [record.encode(b, KEY, Format()) for b in blocks],
        },
        4 * rounds,
    )
    per_block = {f"{name}_us": 1000 * times.median_ms(name) / len(blocks) for name in ("xxh3", "encode")}
    return {"payload_bytes": len(raw[0]), **per_block, "ratio": times.ratio("encode", "xxh3")}


def _wire(blocks: Sequence[Tensor], store: Store, rounds: int) -> Row:
    """GB/s of stored bytes to and from a store, for one batch of raw fp32 records per call."""
    values = [record.encode(b, KEY, Format()) for b in blocks]
    keys = [b"kvlab-bench" + bytes([i]) * 21 for i in range(len(blocks))]
    times = time_rounds({"set": lambda: store.put_many(keys, values), "get": lambda: store.get_many(keys)}, rounds)
    store.delete_many(keys)
    counts = store.stats()
    if counts.misses or counts.drops:
        raise KVLabError(f"the store lost values: misses {dict(counts.misses)}, drops {dict(counts.drops)}")
    size = sum(len(p) for v in values for p in v)
    return {f"{name}_gbps": size / times.median_ms(name) / 1e6 for name in ("set", "get")}


def _standard_error(x: Sequence[float]) -> float:
    return statistics.stdev(x) / math.sqrt(len(x)) if len(x) > 1 else math.nan
