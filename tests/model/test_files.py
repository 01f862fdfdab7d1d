"""Which files are read, and what of them: weights by name, JSON with limits, safetensors like the library does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvlab.errors import ModelError
from kvlab.model import load_model
from kvlab.model.files import parse_json
from kvlab.model.fingerprint import fingerprint_of_folder
from tests.harness.helpers import edit_json
from tests.model.folders import (
    EMBEDDING,
    HEAD,
    Change,
    other_weights,
    overwrite,
    run,
    save_weights,
    sharded,
    weights_of,
    write_index,
)

INDEX = "model.safetensors.index.json"


# --- which files --------------------------------------------------------------------------------
STRAYS = (
    "model_old.safetensors",
    "model-00001-of-00002.safetensors",
    "a.safetensors",
    "model.fp16.safetensors",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "model.safetensors.bak",
    "Model.safetensors.safetensors",
)


@pytest.mark.parametrize("name", STRAYS)
@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_a_stray_file_is_left_alone(folder: Path, name: str, layout: str) -> None:
    stray = other_weights(folder)
    if layout == "shards":
        sharded(folder)
    logits, print_ = run(load_model(folder)), fingerprint_of_folder(folder)
    save_weights(folder, {**stray, "extra": torch.ones(1)}, name)
    assert torch.equal(run(load_model(folder)), logits)
    assert fingerprint_of_folder(folder) == print_
    (folder / name).write_bytes(b"not even safetensors")
    assert torch.equal(run(load_model(folder)), logits)
    assert fingerprint_of_folder(folder) == print_


def test_a_pickle_beside_the_weights_is_not_touched(folder: Path) -> None:
    logits = run(load_model(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert torch.equal(run(load_model(folder)), logits)


def test_one_file_counts_before_an_index(folder: Path) -> None:
    """As in transformers: an index that was left behind is not read."""
    logits, weights = run(load_model(folder)), other_weights(folder)
    sharded(Path(shutil.copytree(folder, folder.with_name("b"))))
    for file in folder.with_name("b").glob("model-*"):
        shutil.copy(file, folder)
    save_weights(folder, weights, "model-00001-of-00003.safetensors")
    for index in ({"weight_map": {"a": "../../etc/passwd"}}, {"weight_map": {}}, []):
        (folder / INDEX).write_text(json.dumps(index))
        assert torch.equal(run(load_model(folder)), logits)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_an_index_names_the_files(folder: Path, shards: int) -> None:
    logits, print_ = run(load_model(folder)), fingerprint_of_folder(folder)
    sharded(folder, shards)
    assert torch.equal(run(load_model(folder)), logits)
    assert fingerprint_of_folder(folder) == print_


@pytest.mark.parametrize("place", ["part-a.safetensors", "sub/x.safetensors", "./model.bin", ".hidden", "wéights"])
def test_a_shard_may_have_any_name_in_the_folder(folder: Path, place: str) -> None:
    logits, weights = run(load_model(folder)), weights_of(folder)
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / place)
    write_index(folder, dict.fromkeys(weights, place))
    assert torch.equal(run(load_model(folder)), logits)


def test_each_tensor_comes_from_the_file_that_the_index_names(folder: Path) -> None:
    """Both shards hold every weight; the index takes one from each."""
    right, wrong = weights_of(folder), other_weights(folder)
    logits, names = run(load_model(folder)), sorted(right)
    (folder / "model.safetensors").unlink()
    homes = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
    for letter in "ab":
        file = f"{letter}.safetensors"
        save_weights(folder, {n: right[n] if homes[n] == file else wrong[n] for n in names}, file)
    write_index(folder, homes)
    assert torch.equal(run(load_model(folder)), logits)


def test_a_shard_may_be_a_link_out_of_the_folder(folder: Path) -> None:
    """As a cache of downloads has it."""
    logits = run(load_model(folder))
    for i, file in enumerate(sharded(folder)):
        blob = folder.with_name(f"blob{i}")
        file.rename(blob)
        file.symlink_to(blob)
    assert torch.equal(run(load_model(folder)), logits)


def index_of(**homes: Any) -> Change:
    """An index that puts some weights elsewhere; `...` leaves one out."""
    named = {name.replace("__", "."): home for name, home in homes.items()}

    def change(folder: Path) -> None:
        sharded(folder)
        old = json.loads((folder / INDEX).read_text())["weight_map"]
        write_index(folder, {n: f for n, f in {**old, **named}.items() if f is not ...})

    return change


def index_text(text: str) -> Change:
    def change(folder: Path) -> None:
        sharded(folder)
        (folder / INDEX).write_text(text)

    return change


def without_a_shard(folder: Path) -> None:
    sharded(folder)[1].unlink()


def with_a_cut_shard(folder: Path) -> None:
    file = sharded(folder)[1]
    overwrite(file, file.read_bytes()[:-10])


def with_an_unnamed_weight(folder: Path) -> None:
    file = sharded(folder)[0]
    save_weights(folder, {**load_file(file), "model.extra": torch.ones(1)}, file.name)


NORM = "model__norm__weight"
BROKEN_INDEX: dict[str, tuple[Change, str]] = {
    "a missing file": (without_a_shard, r"names model-00002-of-00003\.safetensors, which is missing"),
    "a file that never was": (index_of(**{NORM: "b.safetensors"}), r"names b\.safetensors, which is missing"),
    "a file that is cut": (with_a_cut_shard, "model-00002-of-00003.*damaged or cut short"),
    "a weight in the wrong file": (
        index_of(**{NORM: "model-00001-of-00003.safetensors"}),
        r"says that model\.norm\.weight is in model-00001",
    ),
    "a weight in no file": (
        index_of(other="model-00001-of-00003.safetensors"),
        "says that other is in model-00001",
    ),
    "a weight left out": (index_of(**{NORM: ...}), r"does not name model\.norm\.weight, which is in model-0000"),
    "a weight more in a file": (with_an_unnamed_weight, r"does not name model\.extra, which is in model-00001"),
    "out of the folder": (index_of(**{NORM: "../model.safetensors"}), "name of a file in the folder, got '../"),
    "out through a subfolder": (index_of(**{NORM: "a/../../m.safetensors"}), "name of a file in the folder"),
    "the parent": (index_of(**{NORM: ".."}), "name of a file in the folder"),
    "the folder itself": (index_of(**{NORM: "."}), "name of a file in the folder"),
    "an absolute path": (index_of(**{NORM: "/etc/passwd"}), "name of a file in the folder"),
    "a drive": (index_of(**{NORM: "C:m.safetensors"}), "name of a file in the folder"),
    "back strokes": (index_of(**{NORM: "..\\m.safetensors"}), "name of a file in the folder"),
    "a zero byte": (index_of(**{NORM: "m\0.safetensors"}), "name of a file in the folder"),
    "no name": (index_of(**{NORM: ""}), "name of a file in the folder"),
    "a number": (index_of(**{NORM: 5}), "name of a file in the folder"),
    "nothing": (index_of(**{NORM: None}), "name of a file in the folder"),
    "two files": (index_of(**{NORM: ["a", "b"]}), "name of a file in the folder"),
    "no map": (index_text("{}"), "expected a weight_map"),
    "an empty map": (index_text('{"weight_map": {}}'), "expected a weight_map"),
    "a list as map": (index_text('{"weight_map": []}'), "expected a weight_map"),
    "no object": (index_text("[]"), "expected a JSON object, got list"),
    "no JSON": (index_text("{"), r"index\.json cannot be read"),
    "too deep": (index_text("[" * 100_000), r"index\.json cannot be read"),
    "one weight in two files": (
        index_text('{"weight_map": {"a": "model-00001-of-00003.safetensors", "a": "b"}}'),
        "'a' occurs twice",
    ),
}


@pytest.mark.parametrize("name", BROKEN_INDEX)
def test_an_index_that_does_not_fit_says_why(folder: Path, name: str) -> None:
    change, said = BROKEN_INDEX[name]
    change(folder)
    for call in (load_model, fingerprint_of_folder):
        with pytest.raises(ModelError, match=said) as refused:
            call(folder)
        assert str(folder) in str(refused.value)


def test_a_weight_that_is_named_twice_alike_is_one(folder: Path) -> None:
    logits = run(load_model(folder))
    sharded(folder)
    text = (folder / INDEX).read_text()
    name, file = next(iter(json.loads(text)["weight_map"].items()))
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{file}", '))
    assert torch.equal(run(load_model(folder)), logits)


def test_config_may_not_choose_other_weights(folder: Path) -> None:
    """transformers reads the file that `transformers_weights` names."""
    save_weights(folder, other_weights(folder), "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match="transformers_weights"):
        load_model(folder)
    edit_json(folder / "config.json", transformers_weights="model.safetensors")
    load_model(folder)


# --- JSON ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":' + "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        "",
        "{",
        "[]",
        "null",
        "5",
        '"text"',
        "\ufeff{}",
        '{"a": ' + "9" * 5000 + "}",
        '{"vocab_size": 97, "vocab_size": 98}',
    ],
    ids=lambda text: text[:10],
)
def test_what_is_no_json_object_is_refused(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text, "utf-8")
    for call in (load_model, fingerprint_of_folder):
        with pytest.raises(ModelError, match=file.replace(".", r"\.")):
            call(folder)


def test_a_key_that_stands_there_twice_alike_is_one() -> None:
    assert parse_json(b'{"a": [1], "b": 2, "a": [1]}', "here") == {"a": [1], "b": 2}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a circle of links", "a link to nowhere"])
def test_what_is_no_regular_file_is_refused(folder: Path, file: str, kind: str) -> None:
    """Nothing waits for a pipe's other end, or reads a device for ever."""
    path = folder / file
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a circle of links": lambda: path.symlink_to(path),
        "a link to nowhere": lambda: path.symlink_to(folder / "nowhere"),
    }
    make[kind]()
    if file == "tokenizer.json" and kind == "a link to nowhere":
        assert load_model(folder).digests is not None  # a folder may have none
        return
    with pytest.raises(ModelError, match=r"\.json|\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("folder", ["/nowhere", "a\0b", "/dev/null", "", "x" * 5000], ids=repr)
def test_what_is_no_folder_is_refused(folder: str) -> None:
    for call in (load_model, fingerprint_of_folder):
        with pytest.raises(ModelError):
            call(folder)


def test_a_head_that_is_stored_alone_is_the_embedding_of_a_tied_model(folder: Path) -> None:
    logits, weights = run(load_model(folder)), weights_of(folder)
    weights[HEAD] = weights.pop(EMBEDDING)
    save_weights(folder, weights)
    assert torch.equal(run(load_model(folder)), logits)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"missing: model\.embed_tokens\.weight"):
        load_model(folder)
