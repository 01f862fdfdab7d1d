"""Eviction policies against their definitions: invariants, slow models, and examples from the papers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core.policies import ARC, FIFO, LFU, LRU, POLICIES, S3FIFO, Policy, Queue
from kvlab.errors import ConfigError, InputError

every_policy = pytest.mark.parametrize("name", POLICIES)
steps = st.lists(
    st.tuples(
        st.sampled_from(("use", "use", "use", "use", "remove", "pin", "unpin")), st.integers(0, 12), st.integers(1, 4)
    ),
    min_size=40,
    max_size=80,
)
Step = tuple[str, int, int]


def use(policy: Any, key: Any, size: int = 1) -> list[Any]:
    """What a cache does when `key` is asked for."""
    if key in policy:
        policy.hit(key)
        return []
    gone: list[Any] = policy.admit(key, size)
    return gone


def fill(policy: Policy[str], keys: str) -> list[str]:
    """Use one key after the other; return all that had to go."""
    return [gone for key in keys for gone in use(policy, key)]


def ghosts(policy: Policy[Any]) -> list[tuple[int, int]]:
    """(used, bound) of everything that is remembered without being there."""
    match policy:
        case S3FIFO():
            return [(policy.ghosts.used, max(0, policy.capacity - max(1, policy.capacity // 10)))]
        case ARC():
            recent, all_four = policy.t1.used + policy.b1.used, policy.used + policy.b1.used + policy.b2.used
            return [(recent, policy.capacity), (all_four, 2 * policy.capacity)]
    return []


def remembered(policy: Policy[Any]) -> int:
    """How many entries all containers of a policy have, nested ones included."""
    parts = [part for part in vars(policy).values() if isinstance(part, dict | Queue)]
    return sum(map(len, parts)) + sum(len(q) for q in policy._queues if q not in parts)


# --- what holds for all -------------------------------------------------------------------------
@every_policy
@given(capacity=st.integers(0, 20), schedule=steps)
def test_a_policy_keeps_its_promises(name: str, capacity: int, schedule: list[Step]) -> None:
    policy: Policy[int] = POLICIES[name](capacity)
    sizes: dict[int, int] = {}
    pins: Counter[int] = Counter()
    for what, key, size in schedule:
        if what == "remove" and not pins[key]:
            policy.remove(key)
            sizes.pop(key, None)
        elif what == "pin" and key in sizes:
            policy.pin(key)
            pins[key] += 1
        elif what == "unpin" and pins[key]:
            policy.unpin(key)
            pins[key] -= 1
        elif what == "use" and not (pins[key] and size != sizes[key]):
            room = capacity - sum(sizes[k] for k in +pins if k != key)
            gone = policy.admit(key, size)
            assert len(set(gone)) == len(gone)
            assert gone == [key] if size > room else set(gone) <= sizes.keys() - {key}
            assert not any(pins[k] for k in gone)
            sizes[key] = size
            for k in gone:
                del sizes[k]
        assert {k for k in range(13) if k in policy} == sizes.keys() and len(policy) == len(sizes)
        assert policy.used == sum(sizes.values()) <= capacity
        assert policy.pinned == sum(sizes[k] for k in +pins)
        assert sum(queue.used for queue in policy._queues) == policy.used
        assert sum(sum(queue.sizes.values()) for queue in policy._queues) == policy.used - policy.pinned
        assert sum(map(len, policy._queues)) == len(policy) - len(+pins)
        assert all(used <= bound for used, bound in ghosts(policy))


@every_policy
@given(capacity=st.integers(1, 12), keys=st.lists(st.integers(0, 20), min_size=30, max_size=60))
def test_nobody_goes_without_need(name: str, capacity: int, keys: list[int]) -> None:
    policy: Policy[int] = POLICIES[name](capacity)
    for key in keys:
        needed = policy.used == capacity and key not in policy
        assert len(use(policy, key)) == needed
        assert key in policy
    assert policy.used == min(capacity, len(set(keys)))


@every_policy
def test_what_does_not_fit_is_refused_and_costs_nobody_anything(name: str) -> None:
    policy: Policy[str] = POLICIES[name](4)
    fill(policy, "abcd")
    assert policy.admit("e", 5) == ["e"]
    assert "e" not in policy and len(policy) == 4
    policy.pin("a")
    policy.pin("b")
    assert policy.admit("e", 3) == ["e"]  # c and d would not have been enough
    assert len(policy) == 4
    assert set(policy.admit("e", 2)) == {"c", "d"}


@every_policy
def test_with_capacity_nought_everything_is_refused(name: str) -> None:
    assert POLICIES[name](0).admit("a") == ["a"]


@every_policy
def test_another_size_is_another_content(name: str) -> None:
    policy: Policy[str] = POLICIES[name](4)
    fill(policy, "abcd")
    gone = policy.admit("d", 3)
    assert len(gone) == 2 and "d" not in gone and "d" in policy and policy.used == 4
    assert policy.admit("d", 1) == [] and policy.used == 2
    assert policy.admit("d", 5) == ["d"] and "d" not in policy


@every_policy
def test_admitting_what_is_there_is_a_hit(name: str) -> None:
    a, b = (POLICIES[name](3) for _ in range(2))
    for key in "abcabadaeafbagh":
        known = key in a
        gone = a.admit(key)
        assert gone == use(b, key)
        assert not (known and gone)


@every_policy
def test_pins_are_counted_and_are_no_uses(name: str) -> None:
    policy: Policy[str] = POLICIES[name](3)
    fill(policy, "abc")
    policy.pin("a")
    policy.pin("a")
    policy.unpin("a")
    assert policy.admit("d") == ["b"]
    policy.unpin("a")
    assert fill(policy, "efg") == ["c", "d", "a"]


@every_policy
def test_the_last_unpin_makes_a_key_the_newest(name: str) -> None:
    policy: Policy[str] = POLICIES[name](5)
    fill(policy, "abcde")
    for key in "abcb":
        policy.pin(key)
    for key in "bcab":
        policy.unpin(key)
    assert fill(policy, "vwxyz") == ["d", "e", "c", "a", "b"]


@every_policy
def test_a_removed_key_starts_over(name: str) -> None:
    policy: Policy[str] = POLICIES[name](3)
    fill(policy, "abcaaa")
    policy.remove("a")
    assert fill(policy, "axyz") == ["b", "c", "a"]


@every_policy
def test_a_mistake_is_named(name: str) -> None:
    policy: Policy[str] = POLICIES[name](3)
    policy.admit("a")
    for call in (policy.hit, policy.pin, policy.unpin):
        with pytest.raises(InputError, match="expected a resident key, got 'x'; admit it first"):
            call("x")
    with pytest.raises(InputError, match="expected a pinned key to unpin, got 'a'"):
        policy.unpin("a")
    with pytest.raises(InputError, match="expected a size of 1 or above, got 0 for 'b'"):
        policy.admit("b", 0)
    with pytest.raises(InputError, match="got nan for 'b'"):
        policy.admit("b", float("nan"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got -2 for 'a'"):
        policy.admit("a", -2)
    assert policy.used == 1
    policy.remove("x")
    policy.pin("a")
    for change in (lambda: policy.remove("a"), lambda: policy.admit("a", 2)):
        with pytest.raises(InputError, match="'a' with 1 pins"):
            change()
    assert policy.admit("a") == [] and policy.used == policy.pinned == 1
    with pytest.raises(ConfigError, match="got -1"):
        POLICIES[name](-1)
    for capacity in (2.5, float("inf"), "10", None):
        with pytest.raises(ConfigError, match="expected a whole number as the capacity, got"):
            POLICIES[name](capacity)  # type: ignore[arg-type]
    assert repr(policy) == f"{type(policy).__name__}(1 keys, 1 of 3 used, 1 pinned)"


@every_policy
@given(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=30, max_size=60))
def test_access_evicts_the_same_whether_or_not_it_is_asked_who_went(
    name: str, capacity: int, uses: list[tuple[int, int]]
) -> None:
    told, silent = POLICIES[name](capacity), POLICIES[name](capacity)
    sizes: dict[int, int] = {}
    for key, size in uses:
        gone = [-1]
        hit = told.access(key, size, gone)
        assert hit == silent.access(key, size) == (sizes.get(key) == size)
        assert gone == [-1] if hit else gone[0] == -1
        sizes[key] = size
        for k in gone[1:]:
            del sizes[k]
        for policy in (told, silent):
            assert {k for k in range(13) if k in policy} == sizes.keys()


@every_policy
def test_access_says_whether_it_was_a_hit(name: str) -> None:
    policy: Policy[str] = POLICIES[name](4)
    gone: list[str] = []
    assert [policy.access(key, 2, gone) for key in "aabba"] == [False, True, False, True, True]
    assert not policy.access("a", 1) and "a" in policy  # another content
    policy.pin("a")
    assert policy.access("a", 1) and not policy.access("c", 4, gone)
    assert gone == ["c"] and "b" in policy


@every_policy
def test_its_own_memory_stays_bounded(name: str) -> None:
    policy: Policy[int] = POLICIES[name](10)
    for i in range(5):
        policy.admit(i)
    for i in range(1000):
        policy.pin(1)
        policy.hit(1)
        policy.unpin(1)
        policy.remove(2)
        policy.admit(2)
        policy.hit(i % 5)
    assert remembered(policy) <= 5 * 4
    for i in range(1000):
        for _ in range(i % 4):
            policy.admit(i)
    assert remembered(policy) <= 10 * 5


class Watched(int):
    """A key that counts how often a key is looked at."""

    looks = 0

    def __hash__(self) -> int:
        Watched.looks += 1
        return hash(int(self))


@every_policy
def test_pinned_keys_are_not_searched_again_and_again(name: str) -> None:
    policy: Policy[Watched] = POLICIES[name](1000)
    for i in map(Watched, range(1000)):
        policy.admit(i)
        if i < 990:
            policy.pin(i)
    Watched.looks = 0
    for i in map(Watched, range(1000, 2000)):
        assert len(policy.admit(i)) == 1
    assert 1000 < Watched.looks < 30_000  # 1000 evictions past 990 pinned ones; a search each time takes a million


def test_a_use_of_a_pinned_key_counts() -> None:
    lfu, s3fifo, arc = LFU[str](3), S3FIFO[str](3), ARC[str](3)
    for policy in (lfu, s3fifo, arc):
        fill(policy, "abc")
        policy.pin("a")
        for _ in range(2):
            policy.hit("a")
        policy.unpin("a")
    assert fill(lfu, "bd") == ["c"] and fill(lfu, "e") == ["d"] and "a" in lfu
    assert s3fifo._hits == {"a": 2}
    assert "a" in arc.t2 and (arc.t1.used, arc.t2.used) == (2, 1)


# --- slow models --------------------------------------------------------------------------------
class Slow:
    """FIFO, LRU and LFU as one sorts them by hand, with sizes and pins."""

    def __init__(self, capacity: int, rank: Callable[[dict[str, int]], Any]) -> None:
        self.capacity, self.rank = capacity, rank
        self.rows: list[dict[str, int]] = []
        self.time = 0

    def row(self, key: int) -> dict[str, int] | None:
        return next((r for r in self.rows if r["key"] == key), None)

    def use(self, key: int, size: int) -> list[int]:
        self.time += 1
        if row := self.row(key):
            row["last"], row["uses"] = self.time, row["uses"] + 1
            return []
        if sum(r["size"] for r in self.rows if r["pins"]) + size > self.capacity:
            return [key]
        gone = []
        while sum(r["size"] for r in self.rows) + size > self.capacity:
            victim = min((r for r in self.rows if not r["pins"]), key=self.rank)
            self.rows.remove(victim)
            gone.append(victim["key"])
        self.rows.append({"key": key, "size": size, "first": self.time, "last": self.time, "uses": 1, "pins": 0})
        return gone


RANKS: dict[str, Callable[[dict[str, int]], Any]] = {
    "fifo": lambda r: r["first"],
    "lru": lambda r: r["last"],
    "lfu": lambda r: (r["uses"], r["last"]),
}


@pytest.mark.parametrize("name", RANKS)
@given(capacity=st.integers(1, 20), schedule=steps)
def test_simple_policies_do_what_sorting_would(name: str, capacity: int, schedule: list[Step]) -> None:
    policy, slow = POLICIES[name](capacity), Slow(capacity, RANKS[name])
    for what, key, size in schedule:
        row = slow.row(key)
        if what == "use":
            assert use(policy, key, size) == slow.use(key, size)
        elif what == "remove" and not (row and row["pins"]):
            policy.remove(key)
            slow.rows = [r for r in slow.rows if r["key"] != key]
        elif what == "pin" and row:
            policy.pin(key)
            row["pins"] += 1
        elif what == "unpin" and row and row["pins"]:
            policy.unpin(key)
            row["pins"] -= 1
            if not row["pins"]:
                slow.time += 1
                row["first"] = row["last"] = slow.time


class SlowS3FIFO:
    """Algorithm 1 of the paper for sizes of 1, with lists; oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.tenth = capacity, max(1, capacity // 10)
        self.S: list[int] = []
        self.M: list[int] = []
        self.G: list[int] = []
        self.freq: dict[int, int] = {}

    def __contains__(self, key: int) -> bool:
        return key in self.S + self.M

    def hit(self, key: int) -> None:
        self.freq[key] = min(self.freq[key] + 1, 3)

    def admit(self, key: int, size: int) -> list[int]:
        queue = self.M if key in self.G else self.S
        before = set(self.S + self.M)
        while len(self.S) + len(self.M) >= self.capacity:
            if len(self.S) >= self.tenth:
                self.evict_small()
            else:
                self.evict_main()
        self.G = [g for g in self.G if g != key][-(self.capacity - self.tenth) :] if self.capacity > self.tenth else []
        queue.append(key)
        self.freq[key] = 0
        return list(before - set(self.S + self.M))

    def evict_small(self) -> None:
        while self.S:
            t = self.S.pop(0)
            if self.freq[t] <= 1:
                self.G.append(t)
                return
            self.M.append(t)
            self.freq[t] = 0
            if len(self.M) > self.capacity - self.tenth:
                return self.evict_main()

    def evict_main(self) -> None:
        while True:
            t = self.M.pop(0)
            if not self.freq[t]:
                return
            self.freq[t] -= 1
            self.M.append(t)


class SlowARC:
    """Figure 4 of the paper, case by case, with lists; least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0.0
        self.T1: list[int] = []
        self.T2: list[int] = []
        self.B1: list[int] = []
        self.B2: list[int] = []

    def __contains__(self, key: int) -> bool:
        return key in self.T1 + self.T2

    def hit(self, key: int) -> None:  # case I
        (self.T1 if key in self.T1 else self.T2).remove(key)
        self.T2.append(key)

    def admit(self, key: int, size: int) -> list[int]:
        T1, T2, B1, B2, c = self.T1, self.T2, self.B1, self.B2, self.c
        before = set(T1 + T2)
        if key in B1:  # case II
            self.p = min(c, self.p + max(1, len(B2) / len(B1)))
            self.replace(key)
            B1.remove(key)
            T2.append(key)
        elif key in B2:  # case III
            self.p = max(0, self.p - max(1, len(B1) / len(B2)))
            self.replace(key)
            B2.remove(key)
            T2.append(key)
        else:  # case IV
            if len(T1) + len(B1) == c:
                if len(T1) < c:
                    B1.pop(0)
                    self.replace(key)
                else:
                    T1.pop(0)
            elif len(T1) + len(T2) + len(B1) + len(B2) >= c:
                if len(T1) + len(T2) + len(B1) + len(B2) == 2 * c:
                    B2.pop(0)
                self.replace(key)
            T1.append(key)
        return list(before - set(T1 + T2))

    def replace(self, key: int) -> None:
        if self.T1 and (len(self.T1) > self.p or (key in self.B2 and len(self.T1) == self.p)):
            self.B1.append(self.T1.pop(0))
        else:
            self.B2.append(self.T2.pop(0))


def some_keys(seed: int, n: int) -> list[int]:
    """A mixed life: popular keys that drift, with runs of new ones between."""
    random = Random(seed)
    keys: list[int] = []
    while len(keys) < n:
        if random.random() < 0.02:
            keys += range(10**6 + len(keys), 10**6 + len(keys) + random.randrange(40))
        else:
            keys.append(int(random.paretovariate(0.7)) % 300 + len(keys) // 500)
    return keys


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [1, 2, 9, 10, 35, 64])
@pytest.mark.parametrize(("name", "slow"), [("s3fifo", SlowS3FIFO), ("arc", SlowARC)])
def test_the_papers_algorithms_are_followed_step_by_step(name: str, slow: Any, capacity: int, seed: int) -> None:
    policy, model = POLICIES[name](capacity), slow(capacity)
    for key in some_keys(seed, 2000):
        assert use(policy, key) == use(model, key)
        if isinstance(policy, ARC):
            assert (policy.p, len(policy.t1), len(policy.t2)) == (model.p, len(model.T1), len(model.T2))
            assert (len(policy.b1), len(policy.b2)) == (len(model.B1), len(model.B2))
        elif isinstance(policy, S3FIFO):
            assert (len(policy.small), len(policy.main)) == (len(model.S), len(model.M))
            assert len(policy.ghosts) == len(model.G)


# --- small examples -----------------------------------------------------------------------------
def test_fifo_lru_and_lfu_differ_on_five_letters() -> None:
    assert {p.__name__: fill(p(3), "aabcbcd") for p in (FIFO, LRU, LFU)} == {"FIFO": ["a"], "LRU": ["a"], "LFU": ["a"]}
    assert {p.__name__: fill(p(3), "abbcad") for p in (FIFO, LRU, LFU)} == {"FIFO": ["a"], "LRU": ["b"], "LFU": ["c"]}


def test_lfu_forgets_the_count_of_who_went() -> None:
    policy = LFU[str](2)
    assert fill(policy, "aaabbcbc") == ["b", "c", "b"]


def test_s3fifo_needs_two_hits_on_trial() -> None:
    policy = S3FIFO[str](10)
    fill(policy, "abcdefghij")
    fill(policy, "abb")
    assert fill(policy, "k") == ["a"]
    assert fill(policy, "l") == ["c"]  # b moved on to main
    assert len(policy.main) == 1


def test_s3fifo_takes_back_who_left_a_ghost_to_main_and_only_then() -> None:
    policy = S3FIFO[str](10)
    assert fill(policy, "abcdefghijk") == ["a"]
    assert "a" in policy.ghosts and len(policy.main) == 0
    assert fill(policy, "a") == ["b"]
    assert "a" not in policy.ghosts and len(policy.main) == 1
    policy.remove("a")
    assert fill(policy, "a") == [] and len(policy.main) == 0


def test_s3fifo_gives_main_one_more_round_for_each_hit() -> None:
    policy = S3FIFO[str](10)
    fill(policy, "abcdefghij" * 3)
    fill(policy, "k")  # all ten pass the trial, nobody was used since: the first goes
    assert "a" not in policy and len(policy.main) == 9 and len(policy.small) == 1
    fill(policy, "b" * 9 + "c")
    assert fill(policy, "l") == ["k"]  # on trial, a tenth is full: main is safe
    assert fill(policy, "lll") == []
    assert fill(policy, "m") == ["d"]  # l passes; b and c go round
    assert fill(policy, "mmnnnooopppqqqrrrsssttt") == list("efghijl")
    assert fill(policy, "u") == ["c"]  # and b, with one of its counts left after that, goes round again
    assert fill(policy, "uuvvvwwwxxxyyyzzz1112223334") == list("mnopqrstu")  # its last round
    assert fill(policy, "445556667778889990001112223334") == list("vwxyz123b")


def test_arc_learns_from_its_ghosts() -> None:
    policy = ARC[str](4)
    fill(policy, "aabbcd")
    assert (len(policy.t1), len(policy.t2), policy.p) == (2, 2, 0)
    assert fill(policy, "e") == ["c"] and "c" in policy.b1
    assert fill(policy, "c") == ["d"] and policy.p == 1  # t1 was above p: its oldest goes again
    assert (len(policy.t1), len(policy.t2)) == (1, 3)
    assert fill(policy, "f") == ["a"] and "a" in policy.b2  # t1 is not above p: t2 gives
    assert fill(policy, "a") == ["e"] and policy.p == 0
    assert {k for k in "abcdef" if k in policy} == {"a", "b", "c", "f"}


def test_arc_moves_its_border_by_sizes() -> None:
    policy = ARC[str](8)
    policy.admit("a", 4)
    policy.hit("a")
    policy.admit("b", 3)
    assert policy.admit("c", 2) == ["b"]
    assert policy.admit("b", 3) == ["a"] and policy.p == 3  # t1, of size 2, is below p now
    assert policy.admit("a", 4) == ["c"] and policy.p == 0  # down by 4, but not below 0


def test_arc_remembers_as_much_as_fits_in_twice_the_capacity() -> None:
    policy = ARC[str](4)
    for key, size in (("a", 2), ("a", 2), ("b", 4), ("b", 4), ("c", 2)):
        policy.admit(key, size)
    assert (policy.used, policy.b1.used, policy.b2.used) == (2, 0, 6)


def test_arc_wants_no_more_than_everything_for_t1() -> None:
    policy = ARC[str](4)
    assert fill(policy, "aabcdeb") == ["b", "c"] and policy.p == 1
    policy.admit("c", 4)
    assert policy.p == 4  # not 5


def test_s3fifo_takes_from_main_when_the_trial_is_pinned() -> None:
    policy = S3FIFO[str](10)
    fill(policy, "abcdefghij" * 3 + "k")
    policy.pin("k")
    assert policy.admit("l") == ["b"] and (policy.small.used, policy.main.used) == (2, 8)


def test_s3fifo_takes_from_a_short_trial_when_main_is_pinned() -> None:
    policy = S3FIFO[str](20)
    fill(policy, "abcdefghijklmnopqrst" * 3 + "u")
    policy.remove("t")
    assert (policy.small.used, policy.main.used) == (1, 18)
    for key in "bcdefghijklmnopqrs":
        policy.pin(key)
    assert policy.admit("v", 2) == ["u"]


# --- what they are for --------------------------------------------------------------------------
def hit_rate(policy: Policy[int], keys: list[int]) -> float:
    hits = 0
    for key in keys:
        hits += key in policy
        use(policy, key)
    return hits / len(keys)


def test_scans_hurt_lru_more_than_s3fifo_and_arc() -> None:
    random, new = Random(7), 10**6
    keys: list[int] = []
    for _ in range(60):
        keys += [int(80 * random.random() ** 2) for _ in range(300)]
        keys += range(new, new + 150)
        new += 150
    rate = {name: hit_rate(POLICIES[name](100), keys) for name in POLICIES}
    assert rate["s3fifo"] > rate["lru"] + 0.05 and rate["arc"] > rate["lru"] + 0.05
    assert rate["s3fifo"] > 0.64 and rate["arc"] > 0.64  # of 0.66 that can be had


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_evicting_one_key_leaves_the_others_and_never_a_pinned_one(policy: type[Policy[str]]) -> None:
    one = policy(10)
    for key, size in (("a", 1), ("b", 3), ("c", 2)):
        one.admit(key, size)
    one.pin("a")
    evicted = [one.evict(), one.evict()]
    assert sorted(map(str, evicted)) == ["b", "c"]
    assert one.evict() is None and "a" in one and one.used == 1
    one.unpin("a")
    assert one.evict() == "a" and one.evict() is None and one.used == 0 and len(one) == 0
