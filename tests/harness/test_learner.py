"""`--impl` tests a learner's classes: correct classes pass the whole suite, each wrong class fails at its bug."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.harness.learner import learner_classes
from tests.harness.run_pytest import run_pytest

RIGHT_STORE = '''
import copy, threading
from kvlab.errors import InputError
from kvlab.stores import Health, Store, StoreStats
from kvlab.stores.base import check_keys

class PlainStore(Store):
    """A dictionary, as a learner might write it."""

    def __init__(self):
        self.values, self.open, self.lock, self.counts = {}, True, threading.RLock(), StoreStats()

    def get_many(self, keys, out=None, reasons=None):
        check_keys(keys)
        if out is not None and len(out) != len(keys):
            raise InputError(f"got {len(keys)} keys and {len(out)} buffers")
        if any(buffer.readonly for buffer in out or []):
            raise InputError("expected writable buffers")
        reasons = [] if reasons is None else reasons
        with self.lock:
            return [self.get(key, out[i].cast("B") if out is not None else None, reasons) for i, key in enumerate(keys)]

    def get(self, key, buffer, reasons):
        self.counts.requested += 1
        value = self.values.get(key)
        reasons.append("")
        if not self.open or value is None:
            reasons[-1] = "absent" if self.open else "closed"
        elif buffer is not None and len(value) > len(buffer):
            reasons[-1] = "too_big"
        if reasons[-1]:
            self.counts.misses[reasons[-1]] += 1
            return None
        self.counts.hits += 1
        self.counts.bytes_out += len(value)
        if buffer is None:
            return value
        buffer[: len(value)] = value
        return buffer[: len(value)]

    def put_many(self, keys, values):
        check_keys(keys)
        if len(values) != len(keys):
            raise InputError(f"got {len(keys)} keys and {len(values)} values")
        with self.lock:
            self.counts.offered += len(keys)
            if not self.open:
                self.counts.drops["closed"] += len(keys)
                return 0
            for key, value in zip(keys, values):
                self.values[key] = b"".join(value) if isinstance(value, tuple) else bytes(value)
                self.counts.stored += 1
                self.counts.bytes_in += len(self.values[key])
            return len(keys)

    def probe(self, keys):
        with self.lock:
            found = [key in self.values for key in keys]
        return (found + [False]).index(False) if self.open else 0

    def touch_many(self, keys):
        with self.lock:
            return [self.open and key in self.values for key in keys]

    def delete_many(self, keys):
        with self.lock:
            return sum(self.values.pop(key, None) is not None for key in keys) if self.open else 0

    def health(self):
        return Health(self.open, "a dictionary" if self.open else "closed")

    def stats(self):
        with self.lock:
            return copy.deepcopy(self.counts)

    def close(self):
        self.open = False
'''

RIGHT_CACHE = """
from kvlab.cache import DistributedKVCache

class MyCache(DistributedKVCache):
    pass
"""

WRONG_CACHE = """
import hashlib, numpy as np
from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace

class ForgetsTheParent(DistributedKVCache):
    def _make_namespace(self, block_tokens):
        ns = super()._make_namespace(block_tokens)
        return ns and LooseNamespace(ns.fingerprint, ns.precision, ns.salt, ns.block_tokens)

class LooseNamespace(Namespace):
    def keys(self, tokens):
        super().keys(tokens)
        ids, B = np.asarray(tokens, dtype="<u4"), self.block_tokens
        blocks = [ids[i : i + B] for i in range(0, len(ids) - B + 1, B)]
        return [hashlib.sha256(self.root + block.tobytes()).digest() for block in blocks]
"""

# Class name: the correct code, the learner's wrong code, and a part of the name of the test that fails.
BUGS = {
    "SumsInsteadOfPrefix": (
        "(found + [False]).index(False) if self.open else 0",
        "sum(found)",
        "longest_present_prefix",
    ),
    "ForgetsToCount": ("self.counts.misses[reasons[-1]] += 1", "pass", "value_that_does_not_fit"),
    "ReturnsACopy": ("return buffer[: len(value)]", "return value", "returned_view_is_the_callers_buffer"),
    "KeepsTheView": ("else bytes(value)", "else value", "may_be_changed_after_they_were_put"),
    "EmptyIsMissing": ("value is None:", "not value:", "an_empty_value_is_a_value"),
    "SharesItsCounters": ("return copy.deepcopy(self.counts)", "return self.counts", "stats_are_a_copy"),
    "HidesThatItIsClosed": ('"absent" if self.open else "closed"', '"absent"', "closed_store_misses_and_drops"),
}


def wrong_store(name: str) -> str:
    """The correct store with one bug."""
    right, wrong, _ = BUGS[name]
    assert RIGHT_STORE.count(right) == 1
    return RIGHT_STORE.replace(right, wrong).replace("PlainStore", name)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The failed tests of each class when the contract suites run on a file of correct and wrong classes."""
    file = tmp_path_factory.mktemp("work") / "mykv.py"
    file.write_text("\n".join([RIGHT_STORE, *map(wrong_store, BUGS), RIGHT_CACHE, WRONG_CACHE]))
    run = run_pytest("tests/contracts", "--impl", str(file), "-k", "impl-", "-rpfE")
    found: dict[str, str] = defaultdict(str)
    for state, test, name in re.findall(r"^(PASSED|FAILED|ERROR) .*::(\w+)\[impl-(\w+)", run.stdout, re.MULTILINE):
        found[name] += f"{test}\n" if state != "PASSED" else ""
    assert found, run.stdout + run.stderr
    return found


def test_right_classes_pass_the_whole_suite(failures: dict[str, str]) -> None:
    assert failures["PlainStore"] == ""
    assert failures["MyCache"] == ""
    assert len(failures) == len(BUGS) + 3


@pytest.mark.parametrize("name", BUGS)
def test_a_wrong_store_is_found_out(failures: dict[str, str], name: str) -> None:
    assert BUGS[name][2] in failures[name]


def test_a_cache_whose_keys_forget_the_parent_is_found_out(failures: dict[str, str]) -> None:
    assert "match_counts_only_leading_blocks" in failures["ForgetsTheParent"]


@pytest.mark.parametrize(("source", "said"), [(None, "found none"), ("import nonsense_", "does not import")])
def test_a_file_that_cannot_be_graded_is_a_clear_error(tmp_path: Path, source: str | None, said: str) -> None:
    file = tmp_path / "mykv.py"
    if source:
        file.write_text(source)
    with pytest.raises(pytest.UsageError, match=said):
        learner_classes(str(file))
