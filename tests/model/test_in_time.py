"""A model is what was loaded, whatever becomes of its folder: before, while and after its files are read.

The rule behind every test: the fingerprint is that of the bytes in memory. Files are fp32 and
loaded as fp32 here, so it can be computed once more from the loaded weights.
"""

from __future__ import annotations

import copy
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kvlab import DistributedKVCache, Llama, MemoryStore, Tokenizer, generate, load_model
from kvlab.errors import ModelError
from kvlab.model.fingerprint import digest_tensors, fingerprint, fingerprint_of_folder, fingerprint_of_model, spec_of
from tests.harness.helpers import edit_json
from tests.model.folders import (
    Change,
    keeping_its_times,
    last_byte_changed,
    other_weights,
    overwrite,
    run,
    save_weights,
    sharded,
    weights_of,
)

WEIGHTS = "model.safetensors"


def of_its_own_bytes(model: Llama) -> bytes:
    """The fingerprint, computed again from what is in memory."""
    assert model.digests is not None
    weights = digest_tensors(model.state_dict().items())
    return fingerprint(model.config, weights, model.digests.tokenizer, dtype=model.dtype)


@pytest.fixture
def other(folder: Path) -> Path:
    """A second version: other weights, other config, other tokenizer."""
    made = Path(shutil.copytree(folder, folder.with_name("other")))
    save_weights(made, other_weights(folder))
    edit_json(made / "config.json", rms_norm_eps=1e-3)
    edit_json(made / "tokenizer.json", normalizer={"type": "NFC"})
    return made


# --- after loading ------------------------------------------------------------------------------
def in_place(file: Path) -> None:
    """As `cp` over it."""
    overwrite(file, last_byte_changed(file.read_bytes()))


def with_zeros(file: Path) -> None:
    overwrite(file, bytes(file.stat().st_size))


def put_in_its_place(file: Path) -> None:
    """As `mv` over it."""
    part = file.with_name("part")
    part.write_bytes(last_byte_changed(file.read_bytes()))
    part.replace(file)


def relinked(file: Path) -> None:
    part = file.with_name("elsewhere")
    part.write_bytes(last_byte_changed(file.read_bytes()))
    file.unlink()
    file.symlink_to(part)


AFTER: dict[str, Change] = {
    "overwritten": lambda f: in_place(f / WEIGHTS),
    "overwritten with zeros": lambda f: with_zeros(f / WEIGHTS),
    "overwritten, its times set back": lambda f: keeping_its_times(f / WEIGHTS, lambda: in_place(f / WEIGHTS)),
    "cut short": lambda f: os.truncate(f / WEIGHTS, 100),
    "emptied": lambda f: os.truncate(f / WEIGHTS, 0),
    "replaced": lambda f: put_in_its_place(f / WEIGHTS),
    "a link to another": lambda f: relinked(f / WEIGHTS),
    "weights deleted": lambda f: (f / WEIGHTS).unlink(),
    "folder deleted": shutil.rmtree,
    "other config": lambda f: edit_json(f / "config.json", rms_norm_eps=0.5),
    "config deleted": lambda f: (f / "config.json").unlink(),
    "other tokenizer": lambda f: edit_json(f / "tokenizer.json", normalizer={"type": "NFC"}),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "sharded anew": lambda f: sharded(f),
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.usefixtures("settled")
def test_a_loaded_model_does_not_change_with_its_folder(folder: Path, name: str) -> None:
    want = fingerprint_of_folder(folder)
    model = load_model(folder)
    logits = run(model)
    AFTER[name](folder)
    assert fingerprint_of_model(model) == spec_of(model).fingerprint == of_its_own_bytes(model) == want
    assert torch.equal(run(model), logits)


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.usefixtures("settled")
def test_what_is_loaded_next_has_its_own_identity(folder: Path, name: str) -> None:
    old = load_model(folder)
    AFTER[name](folder)
    try:
        new = load_model(folder)
    except ModelError:
        return
    assert fingerprint_of_model(new) == of_its_own_bytes(new) == fingerprint_of_folder(folder)
    assert (fingerprint_of_model(new) == fingerprint_of_model(old)) == (name == "sharded anew")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_loaded_model_holds_no_file(folder: Path) -> None:
    model = load_model(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    held = [str(Path(fd).resolve()) for fd in Path("/proc/self/fd").iterdir()]
    assert not [path for path in held if path.startswith(str(folder))]
    assert model.digests is not None


def test_a_link_that_is_turned_while_the_worker_runs(folder: Path, other: Path) -> None:
    """A deployment flips `current` from the old folder to the new one; both workers share a store."""
    link, store = folder.with_name("current"), MemoryStore()
    link.symlink_to(folder)
    old = load_model(link)
    link.unlink()
    link.symlink_to(other)
    prompt = [n % 97 for n in range(130)]
    generate(old, prompt, 8, DistributedKVCache(model=old, precision="fp32", store=store))
    new = load_model(link)
    cache = DistributedKVCache(model=new, precision="fp32", store=store)
    assert generate(new, prompt, 8).tokens == generate(new, prompt, 8, cache).tokens
    assert spec_of(old).fingerprint == fingerprint_of_folder(folder)
    assert spec_of(new).fingerprint == fingerprint_of_folder(other)


def test_a_tokenizer_that_was_read_later_shows_it(folder: Path, other: Path) -> None:
    model = load_model(folder)
    assert model.digests is not None and Tokenizer(folder).digest == model.digests.tokenizer
    shutil.copy(other / "tokenizer.json", folder)
    assert Tokenizer(folder).digest != model.digests.tokenizer


# --- while loading ------------------------------------------------------------------------------
def load_while(folder: Path, change: Callable[[], object], times: int = 1) -> Llama:
    """Load, with so many changes, each after a weight was read."""
    left = times

    def progress(done: int, total: int) -> None:
        nonlocal left
        if left and done < total / 2:
            left -= 1
            change()

    return load_model(folder, progress=progress)


def deploy(new: Path, folder: Path, files: tuple[str, ...] = (WEIGHTS, "config.json", "tokenizer.json")) -> None:
    """Each file moved into place, one after the other."""
    for file in files:
        shutil.copy(new / file, folder / "part")
        (folder / "part").replace(folder / file)


@pytest.mark.parametrize("how", ["moved", "copied over", "copied over, times set back"])
@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.usefixtures("settled")
def test_a_folder_that_changes_while_it_is_read_is_read_again(folder: Path, other: Path, how: str, file: str) -> None:
    target, new = folder / file, (other / file).read_bytes()
    ways: dict[str, Callable[[], object]] = {
        "moved": lambda: deploy(other, folder, (file,)),
        "copied over": lambda: overwrite(target, new),
        "copied over, times set back": lambda: keeping_its_times(target, lambda: overwrite(target, new)),
    }
    model = load_while(folder, ways[how])
    assert fingerprint_of_model(model) == of_its_own_bytes(model) == fingerprint_of_folder(folder)
    assert torch.equal(run(model), run(load_model(folder)))
    fresh = Path(shutil.copytree(folder, folder.with_name("fresh")))
    assert fingerprint_of_folder(fresh) == fingerprint_of_model(model)  # no memory of a torn reading was left


def test_a_link_that_is_turned_while_it_is_read_gives_the_old_model(folder: Path, other: Path) -> None:
    link = folder.with_name("current")
    link.symlink_to(folder)

    def turn() -> None:
        link.unlink()
        link.symlink_to(other)

    model = load_while(link, turn)
    assert fingerprint_of_model(model) == of_its_own_bytes(model) == fingerprint_of_folder(folder)
    assert fingerprint_of_folder(link) == fingerprint_of_folder(other)


def test_links_to_files_that_are_turned_are_seen(folder: Path, other: Path) -> None:
    """As a cache of downloads lays them out: a folder of links to blobs."""
    links = folder.with_name("snapshot")
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)

    def turn() -> None:
        for file in other.iterdir():
            (links / file.name).unlink()
            (links / file.name).symlink_to(file)

    model = load_while(links, turn)
    assert fingerprint_of_model(model) == of_its_own_bytes(model) == fingerprint_of_folder(other)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_that_are_turned_half_way(folder: Path, other: Path, shards: int) -> None:
    sharded(folder, shards)
    files = tuple(file.name for file in sharded(other, shards))
    model = load_while(folder, lambda: deploy(other, folder, files[1:]))
    assert fingerprint_of_model(model) == of_its_own_bytes(model)  # half old, half new, and nobody else's name
    model = load_while(folder, lambda: deploy(other, folder, (*files, "config.json", "tokenizer.json")))
    assert fingerprint_of_model(model) == of_its_own_bytes(model) == fingerprint_of_folder(other)


def test_one_file_that_takes_the_place_of_shards(folder: Path, other: Path) -> None:
    """What was looked for and missing counts as read: the new file wins in the next attempt."""
    sharded(folder)
    model = load_while(folder, lambda: deploy(other, folder))
    assert fingerprint_of_model(model) == of_its_own_bytes(model) == fingerprint_of_folder(other)


def test_a_folder_that_never_rests_is_refused(folder: Path, cache_home: Path) -> None:
    turns = 0

    def touch() -> None:
        nonlocal turns
        turns += 1
        in_place(folder / WEIGHTS)

    with pytest.raises(ModelError, match="changed while they were read, 3 times"):
        load_while(folder, touch, times=1000)
    assert turns > 3 and not (cache_home / "digests").exists()


@pytest.mark.parametrize("size", [0, 4, 100, 2000])
def test_weights_that_are_cut_while_they_are_read_are_refused(folder: Path, size: int) -> None:
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_while(folder, lambda: os.truncate(folder / WEIGHTS, size))


def test_a_folder_that_is_deleted_while_it_is_read_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        load_while(folder, lambda: shutil.rmtree(folder))


@contextmanager
def meanwhile(change: Callable[[], None]) -> Iterator[None]:
    """Do something again and again in another thread."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            change()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_weights_that_are_always_overwritten_never_get_anothers_name(folder: Path) -> None:
    """No order of reads and writes is prescribed here: the digest is taken of the bytes in memory."""
    versions = [(folder / WEIGHTS).read_bytes()]
    save_weights(folder, other_weights(folder))
    versions.append((folder / WEIGHTS).read_bytes())

    def write() -> None:
        for data in versions:
            overwrite(folder / WEIGHTS, data)

    with meanwhile(write):
        for _ in range(20):
            try:
                model = load_model(folder)
            except ModelError:
                continue
            assert fingerprint_of_model(model) == of_its_own_bytes(model)
    overwrite(folder / WEIGHTS, versions[0])
    assert fingerprint_of_model(load_model(folder)) == of_its_own_bytes(load_model(folder))


def test_a_link_that_is_always_turned_gives_one_of_the_two(folder: Path, other: Path) -> None:
    link, prints = folder.with_name("current"), [fingerprint_of_folder(f) for f in (folder, other)]
    link.symlink_to(folder)

    def turn() -> None:
        for target in (other, folder):
            part = folder.with_name("next")
            part.symlink_to(target)
            part.replace(link)

    with meanwhile(turn):
        models = [load_model(link) for _ in range(15)]
    assert {fingerprint_of_model(model) for model in models} <= set(prints)
    assert all(fingerprint_of_model(model) == of_its_own_bytes(model) for model in models)


# --- in memory ----------------------------------------------------------------------------------
def test_a_change_in_memory_is_told_by_the_folder(folder: Path) -> None:
    model = load_model(folder)
    before = fingerprint_of_model(model)
    model.model.norm.weight[0] += 1
    assert fingerprint_of_model(model) == before  # nobody said so
    model.folder = None
    changed = fingerprint_of_model(model)
    assert changed != before
    model.model.norm.weight[0] += 1
    assert fingerprint_of_model(model) != changed


def test_the_folder_is_only_information(folder: Path, other: Path) -> None:
    model = load_model(folder)
    before = fingerprint_of_model(model)
    model.folder = other
    assert fingerprint_of_model(model) == before


def test_other_weights_of_a_state_dict_are_seen(folder: Path, other: Path) -> None:
    model = load_model(folder)
    model.load_state_dict(load_model(other).state_dict())
    assert model.folder is None
    weights = digest_tensors(weights_of(other).items())
    assert fingerprint_of_model(model) == fingerprint(model.config, weights)


def test_weights_that_were_rounded_on_the_way_are_seen(folder: Path) -> None:
    """Loaded as bf16 and widened, they compute in fp32 and are not the file's."""
    exact = fingerprint_of_model(load_model(folder))
    for rounded in (
        load_model(folder, dtype=torch.bfloat16).float(),
        load_model(folder).half().float(),
        load_model(folder).to(torch.bfloat16).to(torch.float32),
    ):
        assert rounded.dtype == torch.float32
        assert fingerprint_of_model(rounded) != exact


def test_a_move_changes_nothing(folder: Path) -> None:
    model = load_model(folder)
    before = fingerprint_of_model(model)
    assert fingerprint_of_model(model.to("cpu").float()) == before
    assert fingerprint_of_model(copy.deepcopy(model)) == before


def test_a_config_cannot_be_replaced_under_a_model(folder: Path, other: Path) -> None:
    model = load_model(folder)
    with pytest.raises(AttributeError):
        model.config = load_model(other).config  # type: ignore[misc]


def test_a_prompt_is_copied(folder: Path) -> None:
    tokens = torch.tensor([1, 2, 3])
    prompt = load_model(folder).check_tokens(tokens)
    tokens[0] = 5
    assert prompt.tolist() == [[1, 2, 3]]
