"""Stored tensors: which names are weights, and safetensors as the library reads them."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvlab.errors import ModelError
from kvlab.model import PRETRAINED, load_model
from kvlab.model.files import ModelFolder
from kvlab.model.fingerprint import fingerprint_of_folder
from kvlab.model.stored import is_rotary_buffer, stored_tensors
from tests.harness.helpers import edit_json
from tests.model.folders import (
    framed,
    run,
    safetensors_bytes,
    save_weights,
    sharded,
    weights_of,
    with_tensors,
)

INDEX = "model.safetensors.index.json"


# --- buffers that were taken for weights --------------------------------------------------------
BUFFERS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
)
WEIGHTS = (
    "model.layers.0.self_attn.rotary_emb.weight",
    "model.layers.0.self_attn.inv_freq",
    "model.inv_freq",
    "inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq.1",
    "model.layers.x.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb_inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq\n",
    "model.layers.0.self_attn.k_proj.k_scale",
    "model.layers.2.input_layernorm.weight",
    "score.weight",
)


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_known_buffer_is_ignored(folder: Path, name: str, dtype: torch.dtype) -> None:
    logits, print_ = run(load_model(folder)), fingerprint_of_folder(folder)
    with_tensors(**{name: torch.ones(7).to(dtype)})(folder)
    assert is_rotary_buffer(name) and name in load_file(folder / "model.safetensors")
    assert torch.equal(run(load_model(folder)), logits)
    assert fingerprint_of_folder(folder) == print_


def test_a_known_buffer_is_ignored_in_an_index(folder: Path) -> None:
    logits, print_ = run(load_model(folder)), fingerprint_of_folder(folder)
    with_tensors(**{name: torch.ones(3) for name in BUFFERS})(folder)
    sharded(folder)
    assert torch.equal(run(load_model(folder)), logits)
    edit_json(folder / INDEX, weight_map={**json.loads((folder / INDEX).read_text())["weight_map"], BUFFERS[0]: "gone"})
    assert torch.equal(run(load_model(folder)), logits)
    assert fingerprint_of_folder(folder) == print_


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_other_unknown_name_is_an_error(folder: Path, name: str) -> None:
    assert not is_rotary_buffer(name)
    save_weights(folder, {**weights_of(folder), name: torch.ones(3)})
    with pytest.raises(ModelError, match="unknown: "):
        load_model(folder)


# --- safetensors --------------------------------------------------------------------------------
def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with ModelFolder(folder) as files:
        return {name: tensor.read() for name, tensor in files.weights().items()}


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_as_the_library_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    tensors = {"a": numbers, "b": numbers[0, 0].clone(), "c": numbers[:0].clone(), "ü\n": numbers[:, :, None].clone()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"a": "1"})
    got = read_all(tmp_path)
    assert list(got) == sorted(tensors)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert got[name].tolist() == tensor.tolist()


def test_the_shipped_weights_come_back_as_the_library_reads_them() -> None:
    got, want = read_all(PRETRAINED), load_file(PRETRAINED / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def entry(**change: Any) -> bytes:
    """A file of one tensor of two fp32 numbers, with a changed header."""
    header = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return framed(json.dumps({"a": {**header, **change}}).encode()) + bytes(8)


def two(a: list[int], b: list[int], size: int = 16) -> bytes:
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": place} for n, place in (("a", a), ("b", b))}
    return framed(json.dumps(header).encode()) + bytes(size)


GOOD = {
    "one": entry(),
    "none": framed(b"{}"),
    "padded": framed(b"{}" + b" " * 6),
    "two, the other way round": two([8, 16], [0, 8]),
    "no dims": entry(shape=[], data_offsets=[0, 4])[:-4],
    "no numbers": entry(shape=[0, 5], data_offsets=[0, 0])[:-8],
}
BAD = {
    "empty": b"",
    "seven bytes": bytes(7),
    "a header of no length": bytes(8),
    "text": b"this is text" * 100,
    "a header beyond the file": struct.pack("<Q", 100) + b"{}",
    "a header of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2**64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a list": framed(b"[]"),
    "no JSON": framed(b"{"),
    "not UTF-8": framed(b'{"\xff": 1}'),
    "too deep": framed(b"[" * 100_000),
    "deep inside": framed(b'{"a":' * 100_000),
    "half a surrogate pair as name": framed(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "no entry": framed(b'{"a": 5}'),
    "an empty entry": framed(b'{"a": {}}'),
    "unknown dtype": entry(dtype="F3"),
    "dtype a list": entry(dtype=["F32"]),
    "no dtype": entry(dtype=None),
    "shape a number": entry(shape=2),
    "shape negative": entry(shape=[-2]),
    "shape too large": entry(shape=[3]),
    "shape too small": entry(shape=[1]),
    "shape a float": entry(shape=[2.0]),
    "shape true": entry(shape=[True, 2]),
    "shape huge": entry(shape=[2**62, 2**62]),
    "shape huge but for a zero": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])[:-8],
    "no place": entry(data_offsets=None),
    "half a place": entry(data_offsets=[0]),
    "three places": entry(data_offsets=[0, 8, 8]),
    "backwards": entry(data_offsets=[8, 0]),
    "beyond the end": entry(data_offsets=[8, 16]),
    "negative": entry(data_offsets=[-8, 0]),
    "text as place": entry(data_offsets=["0", "8"]),
    "a gap": two([0, 8], [12, 20], 20),
    "an overlap": two([0, 8], [4, 12], 12),
    "the same place": two([0, 8], [0, 8], 8),
    "a byte less": two([0, 8], [8, 16], 15),
    "a byte more": two([0, 8], [8, 16], 17),
    "one name twice": framed(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    )
    + bytes(8),
}


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_what_is_no_safetensors_file_is_refused_where_the_library_does(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes({**GOOD, **BAD}[name])
    if name in GOOD:
        assert {n: t.tolist() for n, t in read_all(tmp_path).items()} == {
            n: t.tolist() for n, t in load_file(file).items()
        }
        return
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut short"):
        read_all(tmp_path)
    if name not in ("shape true", "shape huge but for a zero"):  # here we are stricter
        with pytest.raises((SafetensorError, OSError)), safe_open(file, "pt") as weights:
            weights.keys()


@given(st.data())
def test_damage_anywhere_is_refused_or_read_within_bounds(data: st.DataObject) -> None:
    """Whatever happens to a byte, nothing but a ModelError comes up."""
    good = safetensors_bytes({"a": torch.ones(3, 2), "b": torch.zeros(2)})
    at, cut = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, len(good)))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    for content in (bad, good[:cut], good + bad[:cut]):
        with tempfile.TemporaryFile(buffering=0) as stream:
            stream.write(content)
            stream.seek(0)
            try:
                tensors = [tensor.read() for tensor in stored_tensors(stream).values()]
            except ModelError:
                assert content != good
            else:
                assert sum(t.nbytes for t in tensors) <= len(content)
