"""Ways to write and to change a model folder."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, in memory that no file shares."""
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def save_weights(folder: Path, weights: dict[str, Tensor], file: str = "model.safetensors") -> None:
    save_file(weights, folder / file, metadata={"format": "pt"})


def other_weights(folder: Path) -> dict[str, Tensor]:
    """Of the same names and shapes, with other numbers."""
    return {name: t.flip(0) + 1 for name, t in weights_of(folder).items()}


def with_tensors(**tensors: Tensor) -> Change:
    """Add or replace tensors; `__` in a name stands for a dot."""
    named = {name.replace("__", "."): t for name, t in tensors.items()}
    return lambda folder: save_weights(folder, {**weights_of(folder), **named})


def sharded(folder: Path, shards: int = 3) -> list[Path]:
    """The same weights in several files and an index."""
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names, homes = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_weights(folder, {n: weights[n] for n in names[i::shards]}, file)
        homes |= dict.fromkeys(names[i::shards], file)
    write_index(folder, homes)
    return [folder / file for file in sorted(set(homes.values()))]


def write_index(folder: Path, homes: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def safetensors_bytes(tensors: dict[str, Tensor], names: list[str] | None = None) -> bytes:
    """A file by hand, its fp32 tensors in the order of `names`."""
    header, blob = {}, b""
    for name in names or list(tensors):
        raw = tensors[name].numpy().tobytes()
        place = [len(blob), len(blob) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": place}
        blob += raw
    return framed(json.dumps(header).encode()) + blob


def framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def overwrite(file: Path, data: bytes) -> None:
    """Put other bytes into the same file, as `cp` over it does."""
    with file.open("r+b") as f:
        f.write(data)
        f.truncate()


def last_byte_changed(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def keeping_its_times(file: Path, change: Callable[[], object]) -> None:
    """Set access and modification time back after a change, as `touch -d` can."""
    before = file.stat()
    change()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def run(model: torch.nn.Module) -> Tensor:
    """Logits of twenty tokens."""
    with torch.inference_mode():
        logits: Tensor = model(torch.arange(20)[None])
    return logits
