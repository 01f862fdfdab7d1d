"""Digests of weights and tokenizers, and the memory that keeps unchanged weights from being hashed twice."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import InputError, ModelError
from kvlab.model import PRETRAINED, Tokenizer, load_model
from kvlab.model.digests import WeightsDigest, digest_tensors, tokenizer_digest
from kvlab.model.fingerprint import fingerprint_of_folder, folder_digests, spec_of
from tests.core.make_golden import VECTORS, plain_weights
from tests.core.second import tokenizer2, weights2
from tests.harness.helpers import build_model, edit_json, own_weights
from tests.model.folders import (
    EMBEDDING,
    HEAD,
    keeping_its_times,
    last_byte_changed,
    overwrite,
    safetensors_bytes,
    sharded,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("settled")
PINNED = json.loads(VECTORS.read_text())


# --- weights ------------------------------------------------------------------------------------
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


def test_tensors_that_follow_from_the_rest_are_no_part_of_it() -> None:
    """A tied head, and what RoPE stores."""
    weights = {EMBEDDING: torch.ones(2, 3), "a": torch.ones(1)}
    more = {
        HEAD: torch.ones(2, 3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.11.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.original_inv_freq": torch.ones(4),
        "rotary_emb.inv_freq": torch.ones(4),
        "gpt_neox.layers.0.attention.rotary_emb.cos_cached": torch.ones(4),
        "gpt_neox.layers.0.attention.rotary_emb.sin_cached": torch.ones(4),
    }
    assert digest_tensors({**weights, **more}.items()) == digest_tensors(weights.items())


@pytest.mark.parametrize(
    "more",
    [
        {HEAD: torch.ones(2, 3) + 2**-22},
        {HEAD: torch.ones(3, 2)},
        {HEAD: torch.ones(2, 3, dtype=torch.float16)},
        {"lm_head.bias": torch.ones(2, 3)},
        {"model.inv_freq": torch.ones(4)},
        {"model.layers.0.rotary.inv_freq": torch.ones(4)},
        {"model.layers.0.self_attn.rotary_emb.inv_freq.weight": torch.ones(4)},
        {"model.layers.0.self_attn.rotary_emb.weight": torch.ones(4)},
        {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_any_other_tensor_is(more: dict[str, torch.Tensor]) -> None:
    weights = {EMBEDDING: torch.ones(2, 3), "a": torch.ones(1)}
    assert digest_tensors({**weights, **more}.items()) != digest_tensors(weights.items())


def test_a_head_without_an_embedding_is_a_weight() -> None:
    assert digest_tensors([(HEAD, torch.ones(2, 3))]) != digest_tensors([])


def test_a_name_that_comes_twice_is_refused() -> None:
    weights = WeightsDigest()
    weights.add("a", torch.ones(2))
    with pytest.raises(InputError, match="a twice"):
        weights.add("a", torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_weights_of_any_dtype_have_a_digest(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    name, data = str(dtype).removeprefix("torch."), bytes(tensor.view(torch.uint8).tolist())
    assert digest_tensors([("a", tensor)]) == weights2([("a", name, (3,), data)])


# --- tokenizers ---------------------------------------------------------------------------------
SMALL_TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": {"direction": "Right"},
    "added_tokens": [{"id": 0, "content": '<ü\n\x7f\x01🙂"\\>', "special": True, "lstrip": False}],
    "model": {"vocab": {"b": 1, "a": 0, "Ä": 2}, "dropout": None, "score": [-1.5, 1e-07, 10, 1, 0]},
}


def test_a_second_implementation_agrees_on_the_tokenizer_digest() -> None:
    for text in (json.dumps(SMALL_TOKENIZER), json.dumps(SMALL_TOKENIZER, ensure_ascii=False, indent=2)):
        assert tokenizer_digest(text.encode()) == tokenizer2(text)
    shipped = (PRETRAINED / "tokenizer.json").read_text("utf-8")
    assert tokenizer_digest(shipped.encode()) == tokenizer2(shipped) == Tokenizer().digest
    assert folder_digests(PRETRAINED).tokenizer == Tokenizer().digest


def test_without_a_tokenizer_its_digest_is_empty(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert folder_digests(folder).tokenizer == tokenizer_digest(None) == b""


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000, '{"a":' * 100_000, '{"a": 1, "a": 2}', "\ud800"])
def test_an_unreadable_tokenizer_is_a_clear_error(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, "utf-8", "surrogatepass")
    for call in (fingerprint_of_folder, load_model, Tokenizer):
        with pytest.raises(ModelError, match=r"tokenizer\.json"):
            call(folder)


# --- the memory of digests ----------------------------------------------------------------------
def remembered(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "digests").iterdir())


def refuse_to_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weights: WeightsDigest, name: str, tensor: torch.Tensor) -> None:
        raise AssertionError("the weights were hashed again")

    monkeypatch.setattr(WeightsDigest, "add", refuse)


def test_unchanged_weights_are_hashed_once(folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spec_of(load_model(folder))
    assert len(remembered(cache_home)) == 1
    refuse_to_hash(monkeypatch)
    assert spec_of(load_model(folder)) == before
    assert fingerprint_of_folder(folder) == before.fingerprint
    assert spec_of(load_model(folder, dtype=torch.float16)) != before
    (folder / "model.safetensors").touch()
    with pytest.raises(AssertionError, match="hashed again"):
        load_model(folder)


def test_what_was_hashed_without_loading_is_remembered_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder_digests(folder)
    refuse_to_hash(monkeypatch)
    assert folder_digests(folder) == load_model(folder).digests == before


def test_shards_are_remembered_together(folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sharded(folder)
    before = fingerprint_of_folder(folder)
    assert len(remembered(cache_home)) == 1
    with monkeypatch.context() as patch:
        refuse_to_hash(patch)
        assert fingerprint_of_folder(folder) == before
    overwrite(files[1], last_byte_changed(files[1].read_bytes()))
    assert fingerprint_of_folder(folder) != before


def test_another_index_over_the_same_files_is_another_model(folder: Path) -> None:
    """Two shards hold one name; the index says whose counts. Its files are the same, its digest is not."""
    weights, name = weights_of(folder), "model.norm.weight"
    a, b = sharded(folder, 2)
    index = folder / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    for file, value in ((a, 1.0), (b, 2.0)):
        own = {n: t for n, t in weights.items() if homes[n] == file.name}
        overwrite(file, safetensors_bytes({**own, name: torch.full((32,), value)}))
    prints = []
    for file, value in ((a, 1.0), (b, 2.0)):
        edit_json(index, weight_map={**homes, name: file.name})
        assert load_model(folder).model.norm.weight[0] == value
        prints.append(fingerprint_of_folder(folder))
    assert prints[0] != prints[1]


def test_a_file_that_was_just_written_is_not_remembered(
    folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one step of the clock, two contents would have the same stamp."""
    monkeypatch.setattr("kvlab.model.digests.SETTLED_NS", 3_600_000_000_000)
    before = fingerprint_of_folder(folder)
    assert not (cache_home / "digests").exists()
    overwrite(folder / "model.safetensors", last_byte_changed((folder / "model.safetensors").read_bytes()))
    assert fingerprint_of_folder(folder) != before


def test_a_file_from_the_future_is_not_remembered(folder: Path, cache_home: Path) -> None:
    os.utime(folder / "model.safetensors", (4e9, 4e9))
    assert fingerprint_of_folder(folder) == fingerprint_of_folder(folder)
    assert not (cache_home / "digests").exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "words": lambda text: b"nonsense",
    "cut short": lambda text: text[:-1],
    "only the digest": lambda text: text[:64],
    "longer": lambda text: text + b"00",
    "a line end": lambda text: text + b"\n",
    "one digit": lambda text: (b"1" if text[:1] == b"0" else b"0") + text[1:],
    "one digit of the check": lambda text: text[:-1] + (b"1" if text[-1:] == b"0" else b"0"),
    "zeros": lambda text: b"0" * len(text),
    "no hex": lambda text: b"zz" * 64,
    "no text": lambda text: b"\xff\xfe\x00" * 40,
    "upper case": lambda text: text.upper(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_memory_is_ignored_and_mended(
    folder: Path, cache_home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint_of_folder(folder)
    (memory,) = remembered(cache_home)
    text = memory.read_bytes()
    memory.write_bytes(DAMAGES[name](text))
    assert fingerprint_of_folder(folder) == spec_of(load_model(folder)).fingerprint == before
    assert memory.read_bytes() == text
    refuse_to_hash(monkeypatch)
    assert fingerprint_of_folder(folder) == before


def test_the_memory_of_another_file_is_not_believed(folder: Path, cache_home: Path) -> None:
    fingerprint_of_folder(folder)
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    overwrite(other / "model.safetensors", last_byte_changed((folder / "model.safetensors").read_bytes()))
    right = fingerprint_of_folder(other)
    a, b = remembered(cache_home)
    a_text, b_text = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_text)
    b.write_bytes(a_text)
    assert fingerprint_of_folder(other) == right != fingerprint_of_folder(folder)


def test_a_memory_that_cannot_be_written_costs_only_time(folder: Path, cache_home: Path) -> None:
    cache_home.parent.mkdir(parents=True)
    cache_home.write_text("a file where the folder should be")
    assert fingerprint_of_folder(folder) == fingerprint_of_folder(folder)
    assert cache_home.read_text() == "a file where the folder should be"


def test_a_memory_that_is_a_folder_costs_only_time(folder: Path, cache_home: Path) -> None:
    before = fingerprint_of_folder(folder)
    (memory,) = remembered(cache_home)
    memory.unlink()
    memory.mkdir()
    assert fingerprint_of_folder(folder) == before
    assert [path.name for path in remembered(cache_home)] == [memory.name]  # and no part of a file is left


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_a_cache_home_that_is_no_absolute_path_is_the_default(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fingerprint_of_folder(folder)
    assert len(remembered(tmp_path / "home" / ".cache" / "kvlab")) == 1
    assert not (tmp_path / "relative").exists()


def test_without_a_home_nothing_is_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert fingerprint_of_folder(folder) == fingerprint_of_folder(folder)


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from kvlab.model import digests
from kvlab.model.fingerprint import fingerprint_of_folder
digests.SETTLED_NS = 0
print({fingerprint_of_folder(folder).hex() for _ in range(5) for folder in sys.argv[1:]})
"""


def test_processes_may_fill_the_memory_at_once(folder: Path, cache_home: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder)]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    while any(process.poll() is None for process in processes):  # and somebody clears it all the time
        shutil.rmtree(cache_home, ignore_errors=True)
    said = {process.communicate()[0] for process in processes}
    assert said == {f"{{'{fingerprint_of_folder(folder).hex()}'}}\n"}
    assert not [path for path in remembered(cache_home) if path.suffix]


def test_a_link_to_a_folder_uses_the_same_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    before = fingerprint_of_folder(folder)
    refuse_to_hash(monkeypatch)
    assert fingerprint_of_folder(link) == spec_of(load_model(link)).fingerprint == before


def test_a_file_that_was_moved_uses_the_same_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same inode and times: renaming a folder does not touch its files."""
    before = fingerprint_of_folder(folder)
    moved = folder.rename(folder.with_name("moved"))
    refuse_to_hash(monkeypatch)
    assert fingerprint_of_folder(moved) == before


TOUCHES: dict[str, Callable[[Path], object]] = {
    "mode": lambda file: file.chmod(0o600),
    "time": lambda file: os.utime(file, (1, 1)),
    "times set back": lambda file: keeping_its_times(file, file.touch),
    "one more name": lambda file: file.with_name("hard link").hardlink_to(file),
    "a copy in its place": lambda file: shutil.copy2(file, file.with_name("copy")).replace(file),
    "the same bytes again": lambda file: overwrite(file, file.read_bytes()),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_weights_that_were_touched_in_any_way_are_hashed_again(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint_of_folder(folder)
    TOUCHES[name](folder / "model.safetensors")
    refuse_to_hash(monkeypatch)
    with pytest.raises(AssertionError, match="hashed again"):
        fingerprint_of_folder(folder)


def test_equal_folders_do_not_share_a_memory(folder: Path, cache_home: Path) -> None:
    before = fingerprint_of_folder(folder)
    assert fingerprint_of_folder(Path(shutil.copytree(folder, folder.with_name("copy")))) == before
    assert len(remembered(cache_home)) == 2


# --- progress -----------------------------------------------------------------------------------
@pytest.mark.parametrize("call", [fingerprint_of_folder, folder_digests, load_model])
@pytest.mark.parametrize("change", [lambda folder: None, sharded])
def test_progress_goes_up_to_the_size_of_the_weights(
    folder: Path, call: Callable[..., object], change: Callable[[Path], object]
) -> None:
    change(folder)
    seen: list[tuple[int, int]] = []
    call(folder, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    size = sum(t.nbytes for t in own_weights(build_model()).values())
    assert list(done) == sorted(done) and done[0] > 0 and done[-1] == size
    assert set(totals) == {size}


def test_there_is_no_progress_where_nothing_is_read(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        folder_digests(folder, progress=lambda done, total: seen.append((done, total)))
        count = len(seen)
        assert count == len(own_weights(build_model()))
