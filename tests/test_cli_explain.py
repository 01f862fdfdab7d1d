"""`python -m kvlab explain`: a sentence for people, JSON for programs, and a clear line for what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab import DistributedKVCache, Llama, Tokenizer, generate
from kvlab.cli import FAILURE, SUCCESS, main
from kvlab.model import PRETRAINED
from kvlab.model.fingerprint import fingerprint_of_folder, spec_of, spec_of_folder

TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n        self.items.append(item)\n"
    * 5
)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("KVLAB_STORE", raising=False)
    monkeypatch.delenv("KVLAB_SALT", raising=False)
    monkeypatch.delenv("KVLAB_KEYS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    return f"file://{tmp_path / 'store'}"


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    (tmp_path / "prompt.txt").write_text(TEXT)
    return str(tmp_path / "prompt.txt")


def store_it(url: str, model: Llama, text: str = TEXT, **options: Any) -> int:
    with DistributedKVCache(store=url, model=model, **options) as cache:
        return generate(model, Tokenizer().encode(text), 1, cache).saved_blocks


def explain(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["explain", *arguments, "--json"]) == SUCCESS
    return dict(json.loads(capsys.readouterr().out))


def test_a_prompt_that_is_there(url: str, prompt: str, model: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = store_it(url, model)
    found = explain(capsys, "--url", url, "--model", str(PRETRAINED), prompt)
    assert blocks > 1 and (found["cause"], found["hit_blocks"], found["notes"]) == ("", blocks, [])
    assert main(["explain", "--store", url, prompt]) == SUCCESS
    told = capsys.readouterr().out.splitlines()
    assert told == [f"all {blocks} blocks of the prompt are in the cache", f"  blocks 0 … {blocks - 1}: store"]


def test_other_settings_than_those_of_the_writer(
    url: str,
    prompt: str,
    model: Llama,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_it(url, model)
    folder = tmp_path / "other"
    shutil.copytree(PRETRAINED, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": tokenizer["added_tokens"][:-1]}))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter.safetensors").write_bytes(b"x")
    for cause, options in {
        "precision": ["--precision", "int8"],
        "dtype": ["--dtype", "bfloat16"],
        "block_size": ["--block", "16"],
        "adapter": ["--adapter", str(tmp_path / "lora")],
        "tokenizer": ["--model", str(folder)],
    }.items():
        assert explain(capsys, "--url", url, prompt, *options)["cause"] == cause
    monkeypatch.setenv("KVLAB_SALT", "mine")
    assert explain(capsys, "--url", url, prompt)["cause"] == "salt"


def test_a_prompt_that_diverges_shows_both_texts(
    url: str, prompt: str, model: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_it(url, model)
    (tmp_path / "new.txt").write_text("# 2026-11-28\n" + TEXT)
    assert main(["explain", "--url", url, str(tmp_path / "new.txt"), "--against", prompt]) == SUCCESS
    told = capsys.readouterr().out
    assert "token 0, in block 0, is not that of the other prompt" in told
    assert "here:  '# 2026" in told and "there: 'def add" in told


def test_tokens_in_a_file(url: str, model: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_it(url, model)
    tokens = Tokenizer().encode(TEXT)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    assert explain(capsys, "--url", url, str(tmp_path / "tokens.json"))["cause"] == ""
    (tmp_path / "tokens.json").write_text(json.dumps(tokens[:5]))
    assert explain(capsys, "--url", url, str(tmp_path / "tokens.json"))["cause"] == "below_block"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '{"a": [1]}'), ("a.json", "[]"), ("a.json", "text"), ("a.txt", '[1, 2, "x"]'), ("a.txt", "[1.5, 2]")],
)
def test_a_broken_list_of_tokens_is_not_read_as_text(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    assert main(["explain", "--url", url, str(tmp_path / name)]) != 0
    assert "expected a JSON list of whole numbers" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_not_made(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--url", f"file://{tmp_path}/mistyped", prompt]) != 0
    assert "expected a folder that is there" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()


def test_a_server_that_is_not_there_is_a_cause(url: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = explain(capsys, "--url", "redis://me:secret@127.0.0.1:9", prompt)
    assert found["cause"] == "failed" and "conn" in found["sentence"] and "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "no/such/folder"], "no/such/folder: not a model folder: config.json is missing"),
        (["--adapter", "no/such/folder"], "the files of an adapter cannot be read"),
        (["--against", "no-such-file"], "No such file"),
        (["--precision", "fp7"], "expected one of the precisions"),
        (["--dtype", "float99"], "expected a compute dtype"),
        (["--url", "fakeredis://"], "expected --url with a store that others use"),
        (["--url", "http://x"], "expected a store URL"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    options: list[str], told: str, url: str, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--url", url, prompt, *options]) == FAILURE
    error = capsys.readouterr().err
    assert told in error and error.startswith("kvlab: ") and error.count("\n") == 1


@pytest.mark.parametrize(("content", "told"), [(b"", "not empty"), (b"\xff\xfe", "UTF-8"), (b"[4294967296]", "tokens")])
def test_a_prompt_that_is_none(
    content: bytes, told: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_bytes(content)
    assert main(["explain", "--url", url, str(tmp_path / "x")]) == FAILURE
    assert told in capsys.readouterr().err


def test_master_keys_come_from_the_environment(
    url: str, prompt: str, model: Llama, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_it(url, model, encryption_keys={1: b"k" * 32})
    assert explain(capsys, "--url", url, prompt)["cause"] == "failed"
    monkeypatch.setenv("KVLAB_KEYS", "1:" + (b"k" * 32).hex())
    assert explain(capsys, "--url", url, prompt)["cause"] == ""
    monkeypatch.setenv("KVLAB_KEYS", "1:00zz")
    assert main(["explain", "--url", url, prompt]) == FAILURE
    assert "zz" not in capsys.readouterr().err


def test_without_a_store_there_is_nothing_to_explain(
    prompt: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", prompt]) == FAILURE
    assert "or KVLAB_STORE; got none" in capsys.readouterr().err
    monkeypatch.setenv("KVLAB_STORE", url)
    assert explain(capsys, prompt)["cause"] == "never_stored"


def test_a_folder_has_the_spec_of_its_model(model: Llama) -> None:
    spec = spec_of_folder(PRETRAINED)
    assert spec == spec_of(model) and spec.origin == spec_of(model).origin
    assert spec.fingerprint == fingerprint_of_folder(PRETRAINED)
    assert spec_of_folder(PRETRAINED, torch.float16).fingerprint == fingerprint_of_folder(PRETRAINED, "float16")
