"""Keys and fingerprints: pinned by vectors, checked by a second implementation, and sensitive to all they should be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec, Namespace, text_key, token_bytes
from kvlab.errors import ConfigError, InputError, KVLabError
from kvlab.model import PRETRAINED, Llama, load_model
from kvlab.model import fingerprint as identity
from kvlab.model.fingerprint import digest_tensors, fingerprint, spec_of
from kvlab.model.llama import RopeScaling
from kvlab.stores import MemoryStore
from tests.core.make_golden import VECTORS, plain_model, plain_weights
from tests.harness.helpers import build_model, edit_json, exact_kv, own_weights, save_folder, small_spec

PINNED = json.loads(VECTORS.read_text())


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digests are remembered here, never in the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvlab"


# --- a second implementation, from the text of kvlab.core.keys ------------------------------
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


PLAIN_CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
}


# --- vectors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("vector", PINNED["namespaces"], ids=lambda v: f"{v['precision']}-{v['B']}")
def test_block_keys_are_the_pinned_ones(vector: dict[str, Any]) -> None:
    print_, salt = bytes.fromhex(vector["fingerprint"]), bytes.fromhex(vector["salt"])
    inputs = (print_, vector["precision"], salt, vector["B"])
    assert Namespace(*inputs).root.hex() == root2(*inputs).hex() == vector["root"]
    keys = [key.hex() for key in Namespace(*inputs).keys(vector["tokens"])]
    assert keys == [key.hex() for key in keys2(*inputs, vector["tokens"])] == vector["keys"]
    assert len(keys) == len(vector["tokens"]) // vector["B"]


@pytest.mark.parametrize("vector", PINNED["texts"], ids=lambda v: v["prefix"])
def test_text_keys_are_the_pinned_ones(vector: dict[str, Any]) -> None:
    salt, print_ = bytes.fromhex(vector["salt"]), bytes.fromhex(vector["fingerprint"])
    inputs = (vector["prefix"], vector["layer"], vector["precision"], salt, print_)
    assert text_key(*inputs).hex() == text_key2(*inputs).hex() == vector["key"]


def test_the_weights_digest_is_the_pinned_one() -> None:
    floats = struct.pack("<6f", *range(6))
    second = weights2(
        [
            ("a.weight", "bfloat16", (2,), bytes.fromhex("803f00c0")),
            ("b.weight", "float32", (2, 3), floats),
            ("c.scale", "float16", (), bytes.fromhex("0038")),
        ]
    )
    assert digest_tensors(plain_weights().items()).hex() == second.hex() == PINNED["plain_weights"]


def test_the_fingerprint_is_the_pinned_one() -> None:
    weights = digest_tensors(own_weights(plain_model()).items())
    for adapter, name in ((b"", "plain_model"), (b"lora", "plain_model_with_adapter")):
        second = fingerprint2(PLAIN_CONFIG, weights, b"", adapter, "float32")
        assert fingerprint(plain_model(), adapter).hex() == second.hex() == PINNED[name]
    untied = fingerprint2(
        PLAIN_CONFIG, digest_tensors(own_weights(plain_model(tied=False)).items()), b"", b"", "float32"
    )
    assert fingerprint(plain_model(tied=False)).hex() == untied.hex() == PINNED["plain_model_untied"]


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


SMALL_TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": {"direction": "Right"},
    "added_tokens": [{"id": 0, "content": '<ü\n\x7f\x01🙂"\\>', "special": True, "lstrip": False}],
    "model": {"vocab": {"b": 1, "a": 0, "Ä": 2}, "dropout": None, "score": [-1.5, 1e-07, 10, 1, 0]},
}


def test_a_second_implementation_agrees_on_the_tokenizer_digest(tmp_path: Path) -> None:
    for text in (json.dumps(SMALL_TOKENIZER), json.dumps(SMALL_TOKENIZER, ensure_ascii=False, indent=2)):
        (tmp_path / "tokenizer.json").write_text(text, "utf-8")
        assert identity.tokenizer_digest(tmp_path) == tokenizer2(text)
    assert identity.tokenizer_digest(PRETRAINED) == tokenizer2((PRETRAINED / "tokenizer.json").read_text("utf-8"))


def test_without_a_tokenizer_its_digest_is_empty(tmp_path: Path) -> None:
    assert identity.tokenizer_digest(tmp_path) == b""


TENSORS = {
    "a": torch.tensor([1.0, 2.0]),
    "b": torch.tensor([[1.0, 2.0]]),
    "c": torch.tensor([3.0, 4.0], dtype=torch.float16),
    "d": torch.zeros(0),
}


@given(st.permutations(list(TENSORS)))
def test_the_order_of_tensors_does_not_change_the_weights_digest(names: list[str]) -> None:
    assert digest_tensors((n, TENSORS[n]) for n in names) == digest_tensors(TENSORS.items())


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.tensor([1.0, -2.0])},
        {"a": torch.tensor([1.0, 2.0 + 2**-22])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"c": torch.tensor([3.0, 4.0], dtype=torch.float16).view(torch.bfloat16)},
        {"d": torch.zeros(0, 1)},
        {"d": torch.zeros(0, dtype=torch.float16)},
        {"e": torch.zeros(0)},
        {"a": TENSORS["a"] + 2, "c": TENSORS["c"] - 2},
    ],
    ids=str,
)
def test_any_name_dtype_shape_or_number_changes_the_weights_digest(change: dict[str, torch.Tensor]) -> None:
    assert digest_tensors({**TENSORS, **change}.items()) != digest_tensors(TENSORS.items())


def test_tensors_that_change_names_or_vanish_change_the_weights_digest() -> None:
    swapped = {"a": "b", "b": "a"}
    others = [
        {swapped.get(n, n): t for n, t in TENSORS.items()},
        {n + "x": t for n, t in TENSORS.items()},
        {n: t for n, t in TENSORS.items() if n != "d"},
        {},
    ]
    assert len({digest_tensors(tensors.items()) for tensors in (TENSORS, *others)}) == 5


def test_strides_do_not_change_the_weights_digest() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    strided = tensor.T.contiguous().T
    assert not strided.is_contiguous()
    assert digest_tensors([("a", strided)]) == digest_tensors([("a", tensor)])


# --- properties of keys -------------------------------------------------------------------------
prints = st.binary(min_size=32, max_size=32)
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=70)
precisions = st.sampled_from(["fp32", "fp16", "bf16", "int8", "int4"])


@given(prints, precisions, st.binary(max_size=40), st.integers(1, 70), tokens_lists)
def test_both_implementations_agree(print_: bytes, precision: str, salt: bytes, B: int, tokens: list[int]) -> None:
    keys = Namespace(print_, precision, salt, B).keys(tokens)
    assert keys == keys2(print_, precision, salt, B, tokens)
    assert len(set(keys)) == len(keys) == len(tokens) // B


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=60), st.integers(1, 8), st.data())
def test_a_changed_token_changes_its_block_and_all_later_ones(tokens: list[int], B: int, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda t: t != tokens[j]))
    ns = Namespace(bytes(32), "fp32", b"", B)
    before, after = ns.keys(tokens), ns.keys([*tokens[:j], other, *tokens[j + 1 :]])
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [i < j // B for i in range(len(before))]
    assert not set(before[j // B :]) & set(after)


@given(tokens_lists, st.integers(1, 16))
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(tokens: list[int], B: int) -> None:
    ns = Namespace(bytes(32), "fp32", b"", B)
    for cut in (0, len(tokens) // 2, max(0, len(tokens) - 1)):
        assert ns.keys(tokens[:cut]) == ns.keys(tokens)[: cut // B]


ROOT = {"fingerprint": bytes(32), "precision": "fp32", "salt": b"", "block_tokens": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": bytes(31) + b"\1"},
        {"precision": "fp16"},
        {"precision": "bf16"},
        {"salt": b"\0"},
        {"salt": b"tenant"},
        {"block_tokens": 2},
        {"block_tokens": 8},
        {"precision": "fp", "salt": b"32"},
    ],
    ids=str,
)
def test_another_root_shares_no_key(change: dict[str, Any]) -> None:
    tokens = [5] * 64
    own, other = Namespace(**ROOT), Namespace(**{**ROOT, **change})
    assert own.root != other.root
    assert not set(own.keys(tokens)) & set(other.keys(tokens))


@given(st.text(max_size=20), st.integers(0, 100), precisions, st.binary(max_size=8), st.sampled_from([b"", bytes(32)]))
def test_no_text_key_is_a_key_of_anything_else(
    text: str, layer: int, precision: str, salt: bytes, print_: bytes
) -> None:
    key = text_key(text, layer, precision, salt, print_)
    others = [
        text_key(text + "x", layer, precision, salt, print_),
        text_key(text, layer + 1, precision, salt, print_),
        text_key(text, layer, precision + "x", salt, print_),
        text_key(text, layer, precision, salt + b"x", print_),
        text_key(text, layer, precision, salt, b"\1" * 32),
    ]
    blocks = Namespace(bytes(32), precision, salt, 1).keys(list(text.encode()))
    assert key not in others and key not in blocks and len(key) == 32


IN_ANOTHER_PROCESS = """
from kvlab.core.keys import Namespace, text_key
from kvlab.model.fingerprint import fingerprint
from kvlab.model.llama import RopeScaling
from tests.core.make_golden import plain_model
model = plain_model()
print_ = fingerprint(model)
print(print_.hex())
print(*[key.hex() for key in Namespace(print_, "fp16", b"salt", 4).keys(range(1000, 1020))])
print(text_key("prefix", 3, "fp16", b"salt", print_).hex())
"""


def test_two_processes_agree() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    print_ = fingerprint(plain_model())
    keys = Namespace(print_, "fp16", b"salt", 4).keys(list(range(1000, 1020)))
    here = [print_.hex(), " ".join(key.hex() for key in keys), text_key("prefix", 3, "fp16", b"salt", print_).hex()]
    assert runs[0] == runs[1] == here


# --- tokens -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokens", [[1, 2, 3], (1, 2, 3), range(1, 4), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32)]
)
def test_tokens_may_come_in_any_integer_sequence(tokens: Any) -> None:
    assert token_bytes(tokens) == u32(1, 2, 3)


@given(tokens_lists)
def test_every_kind_of_sequence_gives_the_same_bytes(tokens: list[int]) -> None:
    kinds = (tokens, tuple(tokens), np.array(tokens, np.uint32), np.array(tokens, np.int64), [*np.array(tokens, "u4")])
    assert {token_bytes(t) for t in kinds} == {u32(*tokens)}


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [2**64],
        [2**63, -1],
        [0.0],
        [1, 2.5],
        [float("nan")],
        ["1"],
        "123",
        b"123",
        [None],
        None,
        [True, False],
        (False,),
        np.array([True]),
        [1, -1],
        [1, 2**32],
        [1, None],
        [1, "2"],
        [np.float32(1)],
        (1.0,),
        [[1], [2, 3]],
        [[1, 2], [3, 4]],
        5,
        {1: 2},
        torch.tensor([1.0]),
    ],
    ids=repr,
)
def test_what_is_no_sequence_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="expected tokens"):
        token_bytes(tokens)


# --- the spec -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"heads": 0}, {"head_dim": -1}, {"fingerprint": bytes(31)}, {"fingerprint": b""}], ids=str
)
def test_a_spec_with_impossible_numbers_is_refused(wrong: dict[str, Any]) -> None:
    right = {"layers": 1, "heads": 1, "head_dim": 2, "dtype": torch.float32, "fingerprint": bytes(32)}
    with pytest.raises(ConfigError, match="expected positive sizes"):
        KVSpec(**{**right, **wrong})


def test_a_spec_tells_what_a_token_takes() -> None:
    spec = KVSpec(6, 2, 64, torch.float32, bytes(32))
    assert [spec.kv_bytes_per_token(p) for p in ("fp32", "fp16", "bf16", "int8", "int4")] == [
        6144,
        3072,
        3072,
        1536,
        768,
    ]
    with pytest.raises(ConfigError, match="fp8"):
        spec.kv_bytes_per_token("fp8")


def test_the_spec_of_a_model_has_its_sizes_and_fingerprint() -> None:
    model = build_model(heads=4, kv_heads=2, head_dim=16, layers=3)
    spec = spec_of(model)
    assert (spec.layers, spec.heads, spec.head_dim, spec.dtype) == (3, 2, 16, torch.float32)
    assert spec.fingerprint == fingerprint(model)
    assert spec_of(model, adapter=b"lora").fingerprint == fingerprint(model, b"lora") != spec.fingerprint


# --- the fingerprint of a folder: what keeps it -------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with the shipped tokenizer, on disk."""
    made = save_folder(build_model(), tmp_path / "model")
    shutil.copy(PRETRAINED / "tokenizer.json", made)
    return made


def print_of(folder: Path, **options: Any) -> bytes:
    return fingerprint(load_model(folder, **options))


def reversed_order(folder: Path) -> None:
    """The same tensors at other places of the file."""
    weights = load_file(folder / "model.safetensors")
    data = {name: weights[name] for name in sorted(weights, reverse=True)}
    header, blob = {}, b""
    for name, t in data.items():
        raw = t.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + blob)


def with_metadata(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "note": "saved again"})


def sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i in range(3):
        save_file({n: weights[n] for n in names[i::3]}, folder / f"model-0000{i + 1}-of-00003.safetensors")


def with_a_copy_of_the_tied_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")


def config_of_transformers_4(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=10000.0, rope_scaling=None, torch_dtype="float32")


def config_with_what_does_not_matter(folder: Path) -> None:
    edit_json(folder / "config.json", use_cache=False, transformers_version="9", max_position_embeddings=128)


def tokenizer_reformatted(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items())), indent=7, ensure_ascii=True))


def tokenizer_with_run_time_settings(folder: Path) -> None:
    edit_json(
        folder / "tokenizer.json",
        version="2.0",
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    )


@pytest.mark.parametrize(
    "change",
    [
        reversed_order,
        with_metadata,
        sharded,
        with_a_copy_of_the_tied_head,
        config_of_transformers_4,
        config_with_what_does_not_matter,
        tokenizer_reformatted,
        tokenizer_with_run_time_settings,
    ],
)
def test_saving_the_same_model_in_another_way_keeps_its_fingerprint(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before, files = print_of(folder), contents(folder)
    change(folder)
    assert contents(folder) != files
    assert print_of(folder) == before


@pytest.mark.hf
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_model_that_transformers_saved_again_keeps_its_fingerprint(folder: Path, shard: str) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    before = print_of(folder)
    saved = folder.with_name("saved")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(saved, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(saved)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert contents(saved)["config.json"] != contents(folder)["config.json"]
    assert print_of(saved) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_moved_folder_keeps_its_fingerprint(folder: Path) -> None:
    before = print_of(folder)
    assert print_of(folder.rename(folder.with_name("elsewhere"))) == before


def test_a_model_in_memory_and_a_folder_without_tokenizer_are_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert print_of(folder) == fingerprint(build_model())


# --- and what changes it ------------------------------------------------------------------------
def last_weight_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def renamed_weights(folder: Path) -> None:
    """Two weights of one shape change places."""
    weights = load_file(folder / "model.safetensors")
    a, b = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    weights[a], weights[b] = weights[a] + 1, weights[b] + 2
    save_file(weights, folder / "model.safetensors")


def changed_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_theta(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})


def scaled_rope(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0})


def other_eps(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=1e-6)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "change",
    [last_weight_byte, renamed_weights, changed_vocabulary, other_theta, scaled_rope, other_eps, no_tokenizer],
)
def test_another_model_has_another_fingerprint(folder: Path, change: Callable[[Path], None]) -> None:
    before = print_of(folder)
    change(folder)
    assert print_of(folder) != before


def test_a_changed_weight_is_seen_though_size_and_time_are_restored(folder: Path, cache_home: Path) -> None:
    file = folder / "model.safetensors"
    before, stat = print_of(folder), file.stat()
    assert len(remembered(cache_home)) == 1
    last_weight_byte(folder)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert print_of(folder) != before


def test_a_file_put_in_its_place_is_seen_though_size_and_time_are_the_same(folder: Path) -> None:
    file = folder / "model.safetensors"
    before, stat, data = print_of(folder), file.stat(), file.read_bytes()
    other = folder / "other"
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert print_of(folder) != before


def test_every_compute_dtype_has_its_own_fingerprint(folder: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    assert len({print_of(folder, dtype=dtype) for dtype in dtypes}) == 3


def test_rope_kinds_with_the_same_factor_differ() -> None:
    scalings = (None, RopeScaling("linear", 8.0), RopeScaling("llama3", 8.0), RopeScaling("llama3", 8.0, 2.0))
    assert len({identity.config_bytes(build_model(rope_scaling=s)) for s in scalings}) == 4


def changed_config(**change: Any) -> bytes:
    model = build_model()
    model.config = replace(model.config, **change)
    return identity.config_bytes(model)


@pytest.mark.parametrize("name", PLAIN_CONFIG)
def test_every_field_that_shapes_the_numbers_is_part_of_the_identity(name: str) -> None:
    old = getattr(build_model().config, name)
    new = RopeScaling("linear", 2.0) if old is None else not old if isinstance(old, bool) else old * 2
    assert changed_config(**{name: new}) != changed_config()


@pytest.mark.parametrize(
    "change", [{"vocab_size": 98}, {"max_position_embeddings": 512}, {"eos_token_ids": (3,)}], ids=str
)
def test_fields_that_change_no_kv_are_not_part_of_it(change: dict[str, Any]) -> None:
    assert changed_config(**change) == changed_config()


def test_every_field_of_a_rope_scaling_is_part_of_it() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    doubled = [{f.name: getattr(scaling, f.name) * 2} for f in fields(scaling) if f.name != "kind"]
    configs = {changed_config(rope_scaling=replace(scaling, **d)) for d in ({}, {"kind": "linear"}, *doubled)}
    assert len(configs) == 1 + len(fields(scaling))


def test_the_layout_version_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(plain_model())
    monkeypatch.setattr(identity, "LAYOUT_VERSION", 2)
    assert fingerprint(plain_model()) != before


def test_an_adapter_changes_the_fingerprint_of_a_folder(folder: Path) -> None:
    model = load_model(folder)
    assert len({fingerprint(model, adapter) for adapter in (b"", b"one", b"two")}) == 3


def test_compression_is_not_identity_and_precision_is() -> None:
    store, spec = MemoryStore(), small_spec()
    options = {"store": store, "model": spec, "block_tokens": 16}
    writer = DistributedKVCache(precision="fp32", compress="gzip", **options)
    assert writer.save(list(range(32)), exact_kv(spec, 32)) == 2
    for compress in (False, True, "gzip", "zstd"):
        reader = DistributedKVCache(precision="fp32", compress=compress, **options)
        assert reader.match(list(range(32))) == 32
    for precision in ("fp16", "bf16", "int8", "int4"):
        assert DistributedKVCache(precision=precision, compress="gzip", **options).match(list(range(32))) == 0


# --- the memory of digests ----------------------------------------------------------------------
def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise AssertionError("the weights were read again")

    monkeypatch.setattr(identity, "read_weights", refuse)


def remembered(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "digests").iterdir())


def test_the_second_call_reads_no_weights(folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder)
    before = fingerprint(model)
    refuse_to_read(monkeypatch)
    assert fingerprint(model) == before
    assert len(remembered(cache_home)) == 1
    (folder / "model.safetensors").touch()
    with pytest.raises(AssertionError, match="read again"):
        fingerprint(model)


@pytest.mark.parametrize(
    "damage", [b"", b"nonsense", b"ab" * 31, b"ab" * 33, b"\xff\xfe\x00", b"0" * 63, b"zz" * 32], ids=repr
)
def test_a_damaged_memory_is_ignored_and_mended(
    folder: Path, cache_home: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folder)
    before = fingerprint(model)
    (memory,) = remembered(cache_home)
    memory.write_bytes(damage)
    assert fingerprint(model) == before
    refuse_to_read(monkeypatch)
    assert fingerprint(model) == before


def test_a_memory_that_cannot_be_written_costs_only_time(folder: Path, cache_home: Path) -> None:
    cache_home.parent.mkdir(parents=True)
    cache_home.write_text("a file where the folder should be")
    model = load_model(folder)
    assert fingerprint(model) == fingerprint(model)
    assert cache_home.read_text() == "a file where the folder should be"


def test_a_memory_that_is_a_folder_costs_only_time(folder: Path, cache_home: Path) -> None:
    model = load_model(folder)
    before = fingerprint(model)
    (memory,) = remembered(cache_home)
    memory.unlink()
    memory.mkdir()
    assert fingerprint(model) == before


def progress_of(folder: Path) -> list[tuple[int, int]]:
    """What one call reports."""
    seen: list[tuple[int, int]] = []
    fingerprint(load_model(folder), progress=lambda done, total: seen.append((done, total)))
    return seen


@pytest.mark.parametrize("change", [lambda folder: None, sharded, with_a_copy_of_the_tied_head])
def test_progress_goes_up_and_never_beyond_the_size_of_the_weights(
    folder: Path, change: Callable[[Path], None]
) -> None:
    change(folder)
    done, totals = zip(*progress_of(folder), strict=True)
    assert list(done) == sorted(done) and done[0] > 0
    assert set(totals) == {sum(f.stat().st_size for f in folder.glob("*.safetensors"))}
    assert sum(t.nbytes for t in own_weights(build_model()).values()) <= done[-1] <= totals[0]


def test_progress_ends_at_its_total(folder: Path) -> None:
    done, total = progress_of(folder)[-1]
    assert done == total


def test_there_is_no_progress_where_the_digest_is_remembered(folder: Path) -> None:
    assert progress_of(folder)
    assert progress_of(folder) == []


def test_a_link_to_a_folder_uses_the_same_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    before = print_of(folder)
    model = load_model(link)
    refuse_to_read(monkeypatch)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "touch",
    [
        lambda folder: (folder / "model.safetensors").chmod(0o600),
        lambda folder: os.utime(folder / "model.safetensors", (1, 1)),
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "same.safetensors"),
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
    ],
    ids=["mode", "time", "one more file", "name"],
)
def test_weights_that_were_touched_in_any_way_are_read_again(
    folder: Path, touch: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folder)
    fingerprint(model)
    touch(folder)
    refuse_to_read(monkeypatch)
    with pytest.raises(AssertionError, match="read again"):
        fingerprint(model)


def test_equal_folders_do_not_share_a_memory(folder: Path, cache_home: Path) -> None:
    before = print_of(folder)
    assert print_of(Path(shutil.copytree(folder, folder.with_name("copy")))) == before
    assert len(remembered(cache_home)) == 2


def test_a_folder_that_lost_its_weights_is_a_clear_error(folder: Path) -> None:
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(KVLabError, match="safetensors"):
        fingerprint(model)


def test_an_unreadable_tokenizer_is_a_clear_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(KVLabError, match=r"tokenizer\.json"):
        print_of(folder)


def test_tied_and_untied_models_differ() -> None:
    assert fingerprint(build_model(tied=True)) != fingerprint(build_model(tied=False))


def test_any_change_of_a_weight_changes_a_model_in_memory() -> None:
    model: Llama = build_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert fingerprint(model) != before
