"""The page pool against a second account of everything: what each table should read, and who shares what."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvlab.core.keys import Namespace
from kvlab.core.policies import POLICIES
from kvlab.engine.pages import BlockTable, PagePool, PoolExhausted
from kvlab.errors import ConfigError, InputError
from kvlab.model import Llama
from tests.harness.helpers import attentive_model

PAGE, B, PAGES = 2, 4, 12


@pytest.fixture(scope="module")
def model() -> Llama:
    return attentive_model()


def names(block_tokens: int = B) -> Namespace:
    return Namespace(bytes(32), "fp32", b"", block_tokens)


def make(model: Llama, pages: int = PAGES, policy: str = "lru") -> PagePool:
    return PagePool(model, pages, names(), PAGE, policy)


def put(pool: PagePool, table: BlockTable, start: int, values: list[int]) -> None:
    """Write one number for each token, into all layers, planes and heads."""
    pool.make_writable(table, start, start + len(values))
    shape = (*pool.data.shape[:3], len(values), pool.data.shape[-1])
    pool.write(pool.data, table, torch.tensor(values, dtype=torch.float32)[:, None].expand(shape), start)


def got(table: BlockTable, stop: int) -> list[int]:
    """The number of each token, if all layers, planes, heads and dims agree on it."""
    kv = table.read(stop)
    assert (kv == kv[:1, :1, :1, :, :1]).all()
    return [int(x) for x in kv[0, 0, 0, :, 0]]


def fill(pool: PagePool, tokens: list[int]) -> BlockTable:
    """A table with these tokens, as a request makes it: found, written, published."""
    keys = pool.keys(tokens)
    table = pool.new_table(keys, len(tokens))
    start = len(table.keys) * B
    put(pool, table, start, tokens[start:])
    pool.publish(table, keys)
    return table


# --- sharing ------------------------------------------------------------------------------------
def test_a_second_request_shares_the_pages_of_full_blocks_only(model: Llama) -> None:
    pool = make(model)
    one, two = fill(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]), fill(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert one.pages[:4] == two.pages[:4] and one.pages[4] != two.pages[4]
    assert (pool.counts["requested"], pool.counts["hits"], pool.counts["copied"]) == (4, 2, 0)
    assert got(one, 9) == got(two, 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    pool.check_integrity()


def test_equal_blocks_after_different_ones_are_not_shared(model: Llama) -> None:
    pool = make(model)
    one, two = fill(pool, [1, 2, 3, 4, 7, 7, 7, 7]), fill(pool, [1, 2, 3, 5, 7, 7, 7, 7])
    assert not set(one.pages) & set(two.pages)


def test_two_requests_that_compute_the_same_at_the_same_time_keep_their_own_pages(model: Llama) -> None:
    pool, tokens = make(model), [1, 2, 3, 4]
    one, two = pool.new_table(pool.keys(tokens), 4), pool.new_table(pool.keys(tokens), 4)
    for table in (one, two):
        put(pool, table, 0, tokens)
        pool.publish(table, pool.keys(tokens))
        pool.check_integrity()
    assert one.pages != two.pages and one.keys == two.keys
    pool.close(one)
    assert fill(pool, tokens).pages == pool.index.blocks[two.keys[0]].pages
    pool.close(two)
    pool.check_integrity()


def test_a_fork_shares_everything_until_one_of_them_writes(model: Llama) -> None:
    pool = make(model)
    one = fill(pool, [1, 2, 3, 4, 5])
    two = pool.fork(one)
    assert two.pages == one.pages
    put(pool, two, 5, [60])
    assert two.pages[:2] == one.pages[:2] and two.pages[2] != one.pages[2]
    put(pool, one, 5, [6])
    assert (got(one, 6), got(two, 6)) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 60])
    assert pool.counts["copied"] == 1, "the last one that has a page writes in place"
    pool.check_integrity()


def test_blocks_of_two_forks_may_have_a_page_in_common(model: Llama) -> None:
    pool = make(model)
    one = fill(pool, [1, 2, 3])
    two = pool.fork(one)
    for table, last in ((one, 4), (two, 5)):
        put(pool, table, 3, [last])
        pool.publish(table, pool.keys([1, 2, 3, last]))
        pool.check_integrity()
    assert one.pages[0] == two.pages[0] and pool.refs[one.pages[0]] == 4
    pool.close(one)
    pool.close(two)
    with pool.new_table(capacity=PAGES * PAGE):
        assert not pool.index.blocks
    pool.check_integrity()


def test_a_write_into_a_shared_block_changes_nothing_for_others(model: Llama) -> None:
    pool = make(model)
    one, two = fill(pool, [1, 2, 3, 4]), fill(pool, [1, 2, 3, 4])
    put(pool, two, 3, [40])
    assert (got(one, 4), got(two, 4)) == ([1, 2, 3, 4], [1, 2, 3, 40])
    pool.close(two)
    assert got(fill(pool, [1, 2, 3, 4]), 4) == [1, 2, 3, 4]
    pool.check_integrity()


def test_a_fork_of_some_blocks_keeps_only_their_pages(model: Llama) -> None:
    pool, tokens = make(model), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    one = fill(pool, tokens)
    two = pool.fork(one, blocks=1)
    assert (two.pages, two.keys) == (one.pages[:2], one.keys[:1])
    assert [pool.refs[page] for page in one.pages] == [3, 3, 2, 2, 1]
    assert [pool.index.blocks[key].users for key in one.keys] == [2, 1]
    pool.check_integrity()
    pool.close(one)
    assert got(two, 4) == [1, 2, 3, 4]
    with pool.new_table(capacity=(PAGES - 2) * PAGE):
        assert [*pool.index.blocks] == two.keys, "the others may be evicted"
        pool.check_integrity()
    pool.close(two)
    pool.check_integrity()


def test_a_fork_of_blocks_keeps_what_was_in_them_though_the_first_table_writes(model: Llama) -> None:
    pool = make(model)
    one = fill(pool, [1, 2, 3, 4, 5])
    two = pool.fork(one, blocks=1)
    put(pool, one, 3, [40, 50])
    assert (got(one, 5), got(two, 4)) == ([1, 2, 3, 40, 50], [1, 2, 3, 4])
    pool.check_integrity()


@pytest.mark.parametrize("blocks", [0, 2, None])
def test_a_fork_of_no_block_has_no_page_and_of_none_said_has_all(model: Llama, blocks: int | None) -> None:
    pool = make(model)
    one = fill(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    two = pool.fork(one, blocks=blocks)
    assert (len(two.pages), len(two.keys)) == {0: (0, 0), 2: (4, 2), None: (5, 2)}[blocks]
    pool.close(two)
    pool.check_integrity()


@pytest.mark.parametrize("blocks", [-1, 3])
def test_a_fork_of_more_blocks_than_there_are_is_refused(model: Llama, blocks: int) -> None:
    pool = make(model)
    one = fill(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.raises(InputError, match=f"expected 0 … 2 blocks, got {blocks}"):
        pool.fork(one, blocks=blocks)
    assert pool.tables == {one}
    pool.check_integrity()


def test_a_table_that_does_not_count_finds_the_same(model: Llama) -> None:
    pool, tokens = make(model), [1, 2, 3, 4, 5]
    pool.close(fill(pool, tokens))
    before = pool.counts.copy()
    table = pool.new_table(pool.keys(tokens), counts=False)
    assert table.keys == pool.keys(tokens) and pool.counts == before == Counter(requested=1)
    pool.new_table(pool.keys(tokens))
    assert pool.counts == Counter(requested=2, hits=1)


def test_a_pool_belongs_to_nobody_at_first_and_keeps_no_owner_alive(model: Llama) -> None:
    class Owner:
        pass

    pool, owner = make(model), Owner()
    assert pool.owner is None
    pool.owner = weakref.ref(owner)
    assert pool.owner() is owner
    del owner
    gc.collect()
    assert pool.owner() is None


# --- eviction -----------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", POLICIES)
def test_leaves_are_evicted_first_so_that_what_stays_is_a_prefix(model: Llama, policy: str) -> None:
    pool, tokens = make(model, 8, policy), list(range(16))
    pool.close(fill(pool, tokens))
    for taken in range(1, 9):
        with pool.new_table(capacity=taken * PAGE):
            pool.check_integrity()
            left = 4 - -(-taken // 2)
            assert list(pool.index.blocks) == pool.keys(tokens)[:left]


def test_a_block_that_a_table_holds_is_not_evicted(model: Llama) -> None:
    pool = make(model, 4)
    held = fill(pool, [1, 2, 3, 4])
    pool.close(fill(pool, [5, 6, 7, 8]))
    with pool.new_table(capacity=4):
        assert list(pool.index.blocks) == held.keys
        with pytest.raises(PoolExhausted, match="1 pages are needed, 0 are free and at most 0 can be evicted"):
            pool.new_table(capacity=1)
    assert got(held, 4) == [1, 2, 3, 4]
    pool.check_integrity()


def test_the_policy_chooses_among_leaves(model: Llama) -> None:
    pool = make(model, 6)
    for first in (10, 20, 30):
        pool.close(fill(pool, [first, 1, 2, 3]))
    pool.close(fill(pool, [10, 1, 2, 3]))  # used again
    pool.close(pool.new_table(capacity=2))
    assert list(pool.index.blocks) == [*pool.keys([10, 1, 2, 3]), *pool.keys([30, 1, 2, 3])]


# --- bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "8"])
def test_a_pool_of_no_size_is_refused(model: Llama, size: Any) -> None:
    with pytest.raises(ConfigError, match="expected pages as a whole number of at least 1"):
        PagePool(model, size)
    with pytest.raises(ConfigError, match="expected page_tokens as a whole number of at least 1"):
        PagePool(model, 8, None, size)


def test_pages_that_do_not_divide_a_block_and_unknown_policies_are_refused(model: Llama) -> None:
    with pytest.raises(ConfigError, match="blocks of 24 tokens and pages of 16"):
        PagePool(model, 8, names(24))
    with pytest.raises(ConfigError, match="one of the policies fifo, lru"):
        PagePool(model, 8, policy="random")


def test_a_table_is_given_back_once(model: Llama) -> None:
    pool = make(model)
    table = pool.new_table(capacity=3)
    pool.close(table)
    uses: list[Callable[[], object]] = [
        lambda: pool.close(table),
        lambda: pool.grow(table, 1),
        lambda: pool.fork(table),
        lambda: pool.publish(table, []),
        lambda: pool.make_writable(table, 0, 1),
    ]
    for use in uses:
        with pytest.raises(InputError, match="expected an open table of this pool"):
            use()
    with pytest.raises(InputError, match="expected an open table of this pool"):
        make(model).close(pool.new_table())


def test_what_does_not_fit_changes_nothing(model: Llama) -> None:
    pool = make(model, 4)
    pool.close(fill(pool, [1, 2, 3, 4]))
    table = pool.new_table(capacity=4)
    for use in (lambda: pool.grow(table, 9), lambda: pool.new_table(pool.keys([1, 2, 3, 4]), 9)):
        with pytest.raises(PoolExhausted):
            use()
        pool.check_integrity()
        assert (len(table.pages), len(pool.index.blocks), len(pool.tables)) == (2, 1, 1)
    with pytest.raises(InputError, match=r"expected tokens in 0 … 4, got 3 … 5; call grow first"):
        pool.make_writable(table, 3, 5)


def test_keys_that_are_not_those_of_the_table_are_refused(model: Llama) -> None:
    pool = make(model)
    table = fill(pool, [1, 2, 3, 4, 5])
    with pytest.raises(InputError, match="the keys of the 1 full blocks"):
        pool.publish(table, pool.keys([1, 2, 3, 4, 5, 6, 7, 8]))
    with pytest.raises(InputError, match="the keys of the 1 full blocks"):
        pool.publish(table, pool.keys([9, 9, 9, 9]))
    pool.check_integrity()


# --- anything, in any order ---------------------------------------------------------------------
class Account:
    """Random operations on a pool, with a second account of what every table has to read."""

    def __init__(self, model: Llama, policy: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pool = make(model, PAGES, policy)
        self.tables: list[tuple[BlockTable, list[int]]] = []

    def step(self) -> None:
        """One operation, then a check of everything."""
        do = self.rng.choice([self.start, self.start, self.append, self.append, self.fork, self.end])
        try:
            do()
        except PoolExhausted:
            self.end()
        self.pool.check_integrity()

    def start(self) -> None:
        """A request, often with the beginning of an earlier one."""
        first = self.rng.randrange(3)
        tokens = [100 * first + i // 3 * self.rng.choice([1, 1, 1, 2]) for i in range(self.rng.randint(1, 14))]
        keys = self.pool.keys(tokens)
        table = self.pool.new_table(keys, len(tokens))
        found = len(table.keys) * B
        assert got(table, found) == tokens[:found], "a hit is the KV of exactly these tokens"
        put(self.pool, table, found, tokens[found:])
        if self.rng.random() < 0.8:
            self.pool.publish(table, keys)
        self.tables.append((table, tokens))

    def append(self) -> None:
        """Decode a few tokens of one request."""
        if self.tables:
            table, tokens = self.rng.choice(self.tables)
            new = [self.rng.randrange(1000) for _ in range(self.rng.randint(1, 3))]
            self.pool.grow(table, len(tokens) + len(new))
            put(self.pool, table, len(tokens), new)
            tokens += new
            self.pool.publish(table, self.pool.keys(tokens))

    def fork(self) -> None:
        """A second continuation of one request."""
        if self.tables:
            table, tokens = self.rng.choice(self.tables)
            self.tables.append((self.pool.fork(table), list(tokens)))

    def end(self) -> None:
        """Read one request's KV for the last time, and end it."""
        if self.tables:
            table, tokens = self.tables.pop(self.rng.randrange(len(self.tables)))
            assert got(table, len(tokens)) == tokens
            self.pool.close(table)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_20_000_random_operations_lose_no_page_and_mix_up_none(model: Llama, policy: str) -> None:
    """Over the five policies, 100,000 operations."""
    for seed in range(20):
        account = Account(model, policy, seed)
        for _ in range(1000):
            account.step()
        while account.tables:
            account.end()
        account.pool.check_integrity()
        with account.pool.new_table(capacity=PAGES * PAGE):
            assert not account.pool.index.blocks, "every page can be had again"
        assert account.pool.counts["copied"] and account.pool.index.evicted and account.pool.counts["hits"]


def sabotaged_free(pool: PagePool) -> None:
    pool.free.put([next(iter(pool.tables)).pages[0]])


def sabotaged_refs(pool: PagePool) -> None:
    pool.refs[next(iter(pool.tables)).pages[0]] += 1


def sabotaged_index(pool: PagePool) -> None:
    pool.index.blocks.popitem()


@pytest.mark.parametrize("sabotage", [sabotaged_free, sabotaged_refs, sabotaged_index])
def test_a_sabotaged_pool_is_noticed(model: Llama, sabotage: Callable[[PagePool], None]) -> None:
    pool = make(model)
    fill(pool, list(range(9)))
    pool.check_integrity()
    sabotage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()
