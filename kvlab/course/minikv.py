"""A distributed KV cache on one page: what the exercises of the course add up to.

The functions are the exercises' solutions. A learner's `work/mykv.py` is this module with the learner's
functions in their place. Keys and records are those of the package (`kvlab.core.keys`, `kvlab.core.record`):
`MiniCache` and `DistributedKVCache` (FP32, not compressed, not encrypted) read each other's blocks. What the
package has and this page leaves out: lower precisions, compression, encryption, deadlines, circuit breakers,
Redis Cluster and Sentinel, and not sending what the store already has. `MiniPool` is `kvlab.engine.pages` without
runs of neighbouring pages, forks, counters and checks; `MiniTiers` and `MiniPlanner` are `kvlab.engine.tiers` and
`kvlab.engine.planner` without threads, deadlines, gaps and an end that is computed too. `MiniScheduler` is
`kvlab.engine.scheduler` without tiers, preemption, cancellation and limits. `MiniReport` is what
`kvlab.lab.serving`, `replay` and `intervals` say of a load, for a server that is only played.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import redis
import torch
import xxhash
from torch import Tensor

from kvlab.cache import CacheStats, KVCache
from kvlab.core.keys import KVSpec, token_bytes
from kvlab.engine.batch import Row, forward
from kvlab.engine.pages import PagePool
from kvlab.errors import InputError
from kvlab.model import Llama
from kvlab.stores import Health, Store, StoreStats, Value
from kvlab.stores.base import check_buffers, check_keys, check_values, deliver, joined
from kvlab.stores.redis.reasons import reason_of


# --- pages: lesson 02 ---------------------------------------------------------------------------
def read_pages(pages: Tensor, table: list[int], length: int) -> Tensor:
    """The KV of the first `length` tokens, [H, length, D]; pages is [H, pages, page_tokens, D]."""
    return pages[:, table].flatten(1, 2)[:, :length]


def release(refs: list[int], table: list[int]) -> None:
    """Give back the pages of a request that has ended."""
    for page in table:
        refs[page] -= 1
    table.clear()


def own_page(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    """Make the page of the token at `position` one that only this request has; return its number."""
    i = position // pages.shape[2]
    if i < len(table) and refs[table[i]] == 1:
        return table[i]
    new = refs.index(0)
    refs[new] = 1
    if i == len(table):
        table.append(new)
        return new
    pages[:, new] = pages[:, table[i]]
    refs[table[i]] -= 1
    table[i] = new
    return new


def victim(parents: dict[bytes, bytes | None], in_use: set[bytes]) -> bytes | None:
    """The block to evict: not in use, no other block's parent, and of these the one used longest ago."""
    needed = in_use | set(parents.values())
    return next((key for key in parents if key not in needed), None)


class MiniTable:
    """The pages of one request. A model takes it in place of the tensor of `new_kv`."""

    def __init__(self, pool: MiniPool) -> None:
        self.pool = pool
        self.pages: list[int] = []

    @property
    def capacity(self) -> int:
        """Tokens that fit at most."""
        return len(self.pool.refs) * self.pool.page_tokens

    def __getitem__(self, layer: int) -> MiniLayer:
        return MiniLayer(self, layer)


class MiniLayer:
    """One layer of a table."""

    def __init__(self, table: MiniTable, layer: int) -> None:
        self.table, self.layer = table, layer

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write the keys and values [1, H, T, D] of new tokens; return those of all tokens so far."""
        pool, table, stop = self.table.pool, self.table.pages, start + k.shape[2]
        pool.own(table, start, stop)
        at = torch.arange(start, stop)
        page, offset = torch.tensor(table)[at // pool.page_tokens], at % pool.page_tokens
        planes = pool.data[self.layer]  # [P, H, pages, page_tokens, D]
        planes[:, :, page, offset] = torch.stack((k[0], v[0]))
        return read_pages(planes[0], table, stop)[None], read_pages(planes[1], table, stop)[None]


class MiniPool:
    """Pages of KV that requests share, with the blocks of earlier requests under their keys."""

    def __init__(self, model: Llama, pages: int, block_tokens: int = 64, page_tokens: int = 16) -> None:
        self.page_tokens, self.per_block = page_tokens, block_tokens // page_tokens
        self.data = model.new_kv(pages * page_tokens)[:, :, 0].unflatten(3, (pages, page_tokens))
        self.refs = [0] * pages
        self.blocks: dict[bytes, list[int]] = {}  # key: pages
        self.parents: dict[bytes, bytes | None] = {}  # the block used longest ago is the first

    def start(self, keys: Sequence[bytes]) -> MiniTable:
        """A table that shares the pages of the longest prefix of blocks that are here."""
        table = MiniTable(self)
        for key in keys:
            if key not in self.blocks:
                break
            self.parents[key] = self.parents.pop(key)  # now the one used last
            table.pages += self.blocks[key]
        for page in table.pages:
            self.refs[page] += 1
        return table

    def own(self, table: list[int], start: int, stop: int) -> None:
        """Make the pages of the tokens start … stop - 1 writable, and evict blocks for them.

        Raises:
            MemoryError: all pages are in use.
        """
        for position in range(start - start % self.page_tokens, stop, self.page_tokens):
            i = position // self.page_tokens
            while 0 not in self.refs and (i == len(table) or self.refs[table[i]] > 1):
                self.evict()
            own_page(self.data.flatten(0, 2), self.refs, table, position)

    def evict(self) -> None:
        """Forget one block.

        Raises:
            MemoryError: all are in use.
        """
        in_use = {key for key, pages in self.blocks.items() if self.refs[pages[0]] > 1}
        key = victim(self.parents, in_use)
        if key is None:
            raise MemoryError(f"all {len(self.refs)} pages are in use")
        del self.parents[key]
        release(self.refs, self.blocks.pop(key))

    def end(self, table: MiniTable, keys: Sequence[bytes]) -> None:
        """A request ends: remember its full blocks, give back its pages."""
        for i, key in enumerate(keys):
            if key not in self.blocks:
                self.blocks[key] = table.pages[i * self.per_block : (i + 1) * self.per_block]
                self.parents[key] = keys[i - 1] if i else None
                for page in self.blocks[key]:
                    self.refs[page] += 1
        release(self.refs, table.pages)


# --- keys: lesson 03 ----------------------------------------------------------------------------
def root_key(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    """The parent of every first block: everything that a key depends on, but for the tokens."""
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens))
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()


def block_keys(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    """One chained SHA-256 key for each full block of `tokens`."""
    keys, parent = [], root
    for i in range(0, len(tokens) - block_tokens + 1, block_tokens):
        data = struct.pack(f"<{block_tokens}I", *tokens[i : i + block_tokens])
        parts = (b"kvlab/1/block", parent, data)
        parent = hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()
        keys.append(parent)
    return keys


# --- records: lesson 04 -------------------------------------------------------------------------
def pack_record(block: Tensor, key: bytes) -> bytes:
    """One block of FP32 numbers as bytes: a header of 128 bytes with the key and a checksum, then the numbers."""
    payload = block.contiguous().numpy().tobytes()
    dims = [*block.shape, *[0] * (8 - block.ndim)]
    header = struct.pack("<4s8BI8IQQ32s", b"KVL1", 1, 1, 0, 1, 1, 1, block.ndim, 0, 0, *dims, len(payload), 0, key)
    checksum = xxhash.xxh3_64_intdigest(header + bytes(32) + payload)
    return header + checksum.to_bytes(8, "little") + bytes(24) + payload


def open_record(value: bytes, key: bytes) -> str:
    """ok, or the first reason not to use it: length, magic, version, length, checksum, key."""
    if len(value) < 128:
        return "length"
    if value[:4] != b"KVL1":
        return "magic"
    if value[4] != 1:
        return "version"
    if struct.unpack_from("<Q", value, 48)[0] != len(value) - 128:
        return "length"
    digest = xxhash.xxh3_64_intdigest(value[:96] + bytes(32) + value[128:])
    if value[96:128] != digest.to_bytes(8, "little") + bytes(24):
        return "checksum"
    return "ok" if value[64:96] == key else "key"


# --- a Redis: lesson 05 -------------------------------------------------------------------------
def read_values(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    """The values of `names`, None where there is none, in one round trip. What is read lives `ttl_ms` from now."""
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.get(name)
    for name in names:
        pipe.pexpire(name, ttl_ms)
    return list(pipe.execute()[: len(names)])


def write_values(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    """Store all values in one round trip, each for `ttl_ms`; return how many the server took."""
    pipe = client.pipeline(transaction=False)
    for name, value in zip(names, values, strict=True):
        pipe.set(name, value, px=ttl_ms)
    return sum(reply is True for reply in pipe.execute(raise_on_error=False))


class MiniRedis(Store):
    """Bytes by key in one Redis. A fault of the server is a miss or a drop, never an exception."""

    def __init__(self, client: redis.Redis, ttl_s: float = 86400) -> None:
        self.client, self.ttl_ms = client, round(ttl_s * 1000)
        self.counters, self.lock, self.closed = StoreStats(), threading.Lock(), False

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[Any]:
        """The values of keys, None for a miss: new bytes, or the parts of the caller's buffers that hold them."""
        check_buffers(keys, out)
        names = [b"kv:" + key for key in keys]
        values, fault = self.ask(lambda: read_values(self.client, names, self.ttl_ms), [None] * len(keys))
        got, why = [], []
        for i, value in enumerate(values):
            got.append(None if value is None else deliver(value, out[i] if out else None))
            why.append(fault or ("absent" if value is None else "too_big" if got[i] is None else ""))
        with self.lock:
            self.counters.requested += len(keys)
            self.counters.hits += why.count("")
            self.counters.misses.update(reason for reason in why if reason)
            self.counters.bytes_out += sum(len(value) for value in got if value is not None)
        if reasons is not None:
            reasons += why
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:  # type: ignore[override]
        """Store values; return how many the server took."""
        check_values(keys, values)
        names, data = [b"kv:" + key for key in keys], [joined(value) for value in values]
        stored, fault = self.ask(lambda: write_values(self.client, names, data, self.ttl_ms), 0)
        with self.lock:
            self.counters.offered += len(keys)
            self.counters.stored += stored
            if stored < len(keys):
                self.counters.drops[fault or "response"] += len(keys) - stored
            self.counters.bytes_in += sum(map(len, data)) if stored else 0
        return int(stored)

    def probe(self, keys: Sequence[bytes]) -> int:
        """How many keys are there, counted from the first to the first that is not."""
        return [*self.replies("EXISTS", keys), 0].index(0)

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:  # type: ignore[override]
        """Which keys are there; they live on."""
        return [bool(reply) for reply in self.replies("PEXPIRE", keys, self.ttl_ms)]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Delete keys; return how many were there."""
        return sum(self.replies("DEL", keys))

    def replies(self, command: str, keys: Sequence[bytes], *more: int) -> list[int]:
        """The replies to one command for each key, in one round trip; zeros if there are none."""
        check_keys(keys)
        pipe: Any = self.client.pipeline(transaction=False)
        for key in keys:
            pipe.execute_command(command, b"kv:" + key, *more)
        return list(self.ask(pipe.execute, [0] * len(keys))[0])

    def ask(self, call: Callable[[], Any], otherwise: Any) -> tuple[Any, str]:
        """What a call of the server returns and "", or what to use otherwise and why."""
        if self.closed:
            return otherwise, "closed"
        try:
            return call(), ""
        except redis.RedisError as error:
            with self.lock:
                self.counters.faults[reason_of(error)] += 1
            return otherwise, reason_of(error)

    def health(self) -> Health:
        """Whether the server answers."""
        try:
            return Health(False, "closed") if self.closed else Health(bool(self.client.ping()), "answers")
        except redis.RedisError as error:
            return Health(False, str(error))

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        with self.lock:
            return copy.deepcopy(self.counters)

    def close(self) -> None:
        """Close the connections. From now on, all reads are misses."""
        self.closed = True
        self.client.close()


# --- tiers and plans: lesson 06 -----------------------------------------------------------------
def find_block(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> bytes | None:
    """The block under a key, out of host memory or of the store; None if neither has it."""
    if key in host:
        host[key] = host.pop(key)  # the newest of the dict now
        return host[key]
    if key not in store:
        return None
    while len(host) >= room:
        del host[next(iter(host))]  # the oldest
    host[key] = store[key]
    return host[key]


def seen_twice(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    """Count what a request needs; return what now is needed a second time."""
    new = keys[done:]
    for key in new:
        counts[key] = counts.get(key, 0) + 1
    return [key for key in new if counts[key] == 2]


def fetch_seconds(seen: list[tuple[int, float]], blocks: int) -> float:
    """Predict the seconds of a fetch from the sizes and seconds of earlier ones."""
    sizes, seconds = zip(*seen, strict=True)
    each, begin = np.polyfit(sizes, seconds, 1)
    return float(begin + each * blocks)


def best_front(fetch: list[float], compute: list[float]) -> int:
    """How many leading blocks to compute while the others are fetched, so that both are done soonest."""
    blocks = len(compute) - 1
    return min(range(blocks + 1), key=lambda k: max(fetch[blocks - k], compute[k]))


class MiniTiers:
    """Host memory for records in front of a store, with the calls of a store. Writes what is needed twice."""

    def __init__(self, store: MiniRedis, room: int) -> None:
        self.store, self.room = store, room
        self.host: dict[bytes, bytes] = {}  # the one used longest ago comes first
        self.counts: dict[bytes, int] = {}

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, None for a miss."""
        missing = [key for key in keys if key not in self.host]
        values = zip(missing, self.store.get_many(missing), strict=True)
        far = {key: value for key, value in values if value is not None}
        got = [find_block(key, self.host, far, self.room) for key in keys]
        again = {key: value for key, value in zip(keys, got, strict=True) if value is not None and key not in far}
        chosen = [key for key in seen_twice(keys, self.counts, 0) if key in again]
        self.store.put_many(chosen, [again[key] for key in chosen])
        return got

    def put_many(self, keys: list[bytes], values: list[bytes]) -> int:
        """Keep new values in host memory; the store gets those that were needed before."""
        new = dict(zip(keys, values, strict=True))
        for key in keys:
            find_block(key, self.host, new, self.room)
        chosen = seen_twice(keys, self.counts, 0)
        self.store.put_many(chosen, [new[key] for key in chosen])
        return len(keys)

    def probe(self, keys: list[bytes]) -> int:
        """How many keys are there, counted from the first to the first that is not."""
        near = [*(key in self.host for key in keys), False].index(False)
        return near + self.store.probe(keys[near:])

    def health(self) -> Health:
        """Whether the store answers."""
        return self.store.health()

    def close(self) -> None:
        """Close the store."""
        self.store.close()


class MiniPlanner:
    """Decides how many leading blocks to compute while the others are fetched, by what it has seen."""

    def __init__(self) -> None:
        self.fetched: list[tuple[int, float]] = []  # blocks, seconds
        self.computed: list[tuple[int, float]] = []

    def front(self, blocks: int) -> int:
        """How many of so many blocks to compute."""
        seen = [self.fetched[-8:], self.computed[-8:]]  # the wire may have changed since earlier ones
        if any(len({size for size, _ in pairs}) < 2 for pairs in seen):
            return blocks * (1 + len(self.fetched) % 3) // 4  # too little is known: try several
        fetch, compute = ([0.0, *(fetch_seconds(pairs, n) for n in range(1, blocks + 1))] for pairs in seen)
        return best_front(fetch, compute)

    def saw(self, fetched: int, fetch_s: float, computed: int, compute_s: float) -> None:
        """Take note of a request: blocks and seconds of its fetch, and of its front."""
        self.fetched += [(fetched, fetch_s)] if fetched else []
        self.computed += [(computed, compute_s)] if computed else []


# --- serving: lesson 08 -------------------------------------------------------------------------
def fill_step(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    """How many tokens each request computes in the next step: answers first, then prompts, in order."""
    step = dict.fromkeys(decoding, 1)
    budget -= len(decoding)
    for name, remaining in prefilling.items():
        chunk = min(remaining, budget)
        if chunk > 0:
            step[name] = chunk
            budget -= chunk
    return step


def admit(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    """How many of the waiting requests get pages now, given the tokens of each."""
    count = 0
    for tokens in waiting:
        free_pages -= -(-tokens // page_tokens)
        if free_pages < 0:
            break
        count += 1
    return count


def choose_worker(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    """The number of the worker where a request costs least: blocks to compute there, plus its work so far."""
    costs = [blocks - found + weight * done for found, done in zip(matched, work, strict=True)]
    return costs.index(min(costs))


def resume(
    prompt: list[int],
    given: list[int],
    limit: int,
    eos: int,
) -> tuple[list[int], int] | None:
    """What to ask another worker for, if the first one died after `given`."""
    if len(given) == limit or eos in given:
        return None
    return prompt + given, limit - len(given)


class MiniScheduler:
    """Continuous batching: requests join and leave between two steps. Needs a pool that nobody else uses."""

    def __init__(self, model: Llama, pool: PagePool, budget: int = 64) -> None:
        self.model, self.pool, self.budget = model, pool, budget
        self.waiting: dict[str, tuple[list[int], int]] = {}  # the prompt, and the most new tokens
        self.running: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, list[int]] = {}

    def submit(self, name: str, prompt: list[int], new: int) -> None:
        """Queue a request for `new` tokens."""
        self.waiting[name] = prompt, new

    def step(self) -> dict[str, int]:
        """Do one pass of the model; return how many tokens each request had in it."""
        size = self.pool.page_tokens
        room = [len(prompt) + new for prompt, new in self.waiting.values()]
        for name in list(self.waiting)[: admit(room, self.pool.free.total, size)]:
            prompt, new = self.waiting.pop(name)
            table = self.pool.new_table((), len(prompt) + new)
            self.running[name] = {"tokens": list(prompt), "end": len(prompt) + new, "known": 0, "table": table}
        missing = {name: len(r["tokens"]) - r["known"] for name, r in self.running.items()}
        decoding = [name for name, count in missing.items() if count == 1]
        prefilling = {name: count for name, count in missing.items() if count > 1}
        step = fill_step(decoding, prefilling, self.budget)
        rows = []
        for name, count in step.items():
            request = self.running[name]
            chunk = request["tokens"][request["known"] : request["known"] + count]
            rows.append(Row(request["table"], chunk, request["known"]))
            request["known"] += count
        logits = forward(self.model, self.pool, rows) if rows else torch.empty(0)
        for name, row in zip(step, logits, strict=True):
            self.give(name, int(row.argmax()))
        return step

    def give(self, name: str, token: int) -> None:
        """The model's choice after the last token of a row. It counts if that was the last token that is known."""
        request = self.running[name]
        if request["known"] < len(request["tokens"]):
            return
        request["tokens"].append(token)
        if len(request["tokens"]) == request["end"]:
            self.pool.close(request["table"])
            del self.running[name]
            self.answers[name] = request["tokens"]

    def run(self) -> list[dict[str, int]]:
        """Do steps until all requests have ended; return the steps."""
        steps = []
        while self.waiting or self.running:
            before = len(self.waiting)
            steps.append(self.step())
            if not steps[-1] and len(self.waiting) == before:
                raise InputError("expected a budget and a pool in which the next request finds room")
        return steps


# --- inside an engine: lesson 09 ----------------------------------------------------------------
def usable_tokens(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    """How many leading tokens of a prompt to load, if these of its blocks are stored. One is left to compute."""
    blocks = [*present, False].index(False)
    return min(blocks, (prompt_tokens - 1) // block_tokens) * block_tokens


def next_inputs(tokens: list[int], cached: int) -> dict[str, list[int]]:
    """The inputs of a call whose cache has the KV of the first tokens."""
    start = min(cached, len(tokens) - 1)  # the last token gives the logits
    return {
        "ids": tokens[start:],
        "positions": list(range(start, len(tokens))),
        "mask": [1] * len(tokens),
    }


def blocks_to_save(computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int) -> list[int]:
    """The blocks that are whole after a step, were not saved before, and are not in the store."""
    whole = (computed + scheduled) // block_tokens
    return [i for i in range(saved, whole) if i >= len(present) or not present[i]]


def trusted_blocks(filled: list[int], failed: list[int]) -> list[int]:
    """The blocks of a step that may be saved if some loads of it failed."""
    return [i for i in filled if i < min(failed, default=math.inf)]


# --- a benchmark: lesson 10 ---------------------------------------------------------------------
def open_loop(due: list[float], service: list[float], slots: int) -> list[float]:
    """The latency of each request from when it was due, on a server that works on `slots` of them at a time."""
    free = [0.0] * slots  # when each slot has ended its work
    latencies = []
    for at, took in zip(due, service, strict=True):
        first = free.index(min(free))
        free[first] = max(free[first], at) + took
        latencies.append(free[first] - at)
    return latencies


def percentile(counts: dict[float, int], percent: float) -> float:
    """The smallest value v such that at least `percent` % of the values are <= v; `counts`: how often each came."""
    total, seen = sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if 100 * seen >= percent * total:
            return value
    return math.nan  # there are no values


def hit_rates(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    """The four hit rates of requests, each of them its prompt's tokens and how many leading blocks it found."""
    blocks = [math.ceil(tokens / block_tokens) for tokens, _ in requests]
    full = [tokens // block_tokens for tokens, _ in requests]
    found = [count for _, count in requests]
    found_full = [min(count, most) for count, most in zip(found, full, strict=True)]
    found_tokens = [min(count * block_tokens, tokens) for tokens, count in requests]
    shares = [count / most for count, most in zip(found, blocks, strict=True)]
    return {
        "blocks": sum(found) / sum(blocks),
        "tokens": sum(found_tokens) / sum(tokens for tokens, _ in requests),
        "full_blocks": sum(found_full) / max(1, sum(full)),
        "requests": sum(shares) / len(shares),
    }


def ratio_interval(a: list[float], b: list[float], groups: list[str], draws: list[list[str]]) -> tuple[float, float]:
    """The ends between which 95 % of the ratios mean(a) ÷ mean(b) lie, one ratio for each draw of groups."""
    members = {name: [i for i, group in enumerate(groups) if group == name] for name in groups}
    ratios = []
    for drawn in draws:
        places = [i for name in drawn for i in members[name]]
        ratios.append(sum(a[i] for i in places) / sum(b[i] for i in places))
    ratios.sort()
    cut = len(ratios) // 40  # 2.5 % at each end
    return ratios[cut], ratios[-1 - cut]


class MiniReport:
    """What a load gave on one server, from the milliseconds that each request took there."""

    def __init__(self, due: list[float], service: list[float], groups: list[str], slots: int = 1) -> None:
        self.latencies, self.groups = open_loop(due, service, slots), groups

    def at(self, percent: float) -> float:
        """The latency that so many percent of the requests do not exceed, in whole milliseconds."""
        counts: dict[float, int] = {}
        for latency in self.latencies:
            counts[round(latency)] = counts.get(round(latency), 0) + 1
        return percentile(counts, percent)

    def times_faster_than(self, other: MiniReport, draws: int = 400) -> tuple[float, float]:
        """The interval of the other one's mean latency ÷ this one's. Whole groups are drawn, at random."""
        rng, names = random.Random(0), sorted(set(self.groups))
        drawn = [rng.choices(names, k=len(names)) for _ in range(draws)]
        return ratio_interval(other.latencies, self.latencies, self.groups, drawn)


# --- the cache around them ----------------------------------------------------------------------
class MiniCache(KVCache):
    """KV of token prefixes, block by block, in any store with `get_many`, `put_many` and `probe`."""

    def __init__(self, store: MiniRedis, model: KVSpec, salt: bytes = b"", block_tokens: int = 0) -> None:
        self.store, self.spec = store, model
        self.B = block_tokens or model.block_tokens("fp32")
        self.root = root_key(model.fingerprint, "fp32", salt, self.B)
        self.counters = CacheStats()

    @property
    def block_tokens(self) -> int:
        """Tokens in a block. Only full blocks are cached."""
        return self.B

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """One key for each full block of a prompt."""
        token_bytes(tokens)  # raises for anything that is no token
        return block_keys(list(tokens), self.root, self.B)

    def match(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of a prompt are cached now."""
        return self.store.probe(self.keys(tokens)) * self.B

    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """Fill `out` with the KV of tokens[start:stop], block by block; return the position that it got to."""
        keys = self.keys(tokens)
        if start % self.B or stop % self.B or not 0 <= start <= stop <= len(tokens):
            raise InputError(f"expected start <= stop <= {len(tokens)} in steps of {self.B}, got {start}, {stop}")
        self.check_shape(out, stop - start)
        keys = keys[start // self.B : stop // self.B]
        good = 0
        for key, value in zip(keys, self.store.get_many(keys), strict=True):
            reason = "absent" if value is None else open_record(value, key)
            block = out[:, :, :, good * self.B : (good + 1) * self.B]
            if value is None or reason != "ok":
                self.counters.misses += {reason: 1, "gap": len(keys) - good - 1}
                break
            self.counters.bytes_read += len(value)
            block.copy_(torch.frombuffer(bytearray(value), dtype=torch.float32, offset=128).reshape(block.shape))
            good += 1
        self.counters.requested += len(keys)
        self.counters.hits += good
        return start + good * self.B

    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0) -> int:
        """Store the KV of every full block from `start` on; return how many the store took."""
        keys = self.keys(tokens)
        self.check_shape(kv, len(tokens))
        blocks = range(-(-start // self.B), len(keys))
        values = [pack_record(kv[:, :, :, i * self.B : (i + 1) * self.B].float(), keys[i]) for i in blocks]
        stored = self.store.put_many([keys[i] for i in blocks], values)
        self.counters.stored += stored
        self.counters.drops["store"] += len(values) - stored
        self.counters.bytes_written += sum(len(value) for value in values)
        return stored

    def check_shape(self, kv: Tensor, tokens: int) -> None:
        """Refuse a tensor that is no KV of so many tokens of this model."""
        shape = (self.spec.layers, 2, self.spec.heads, tokens, self.spec.head_dim)
        if tuple(kv.shape) != shape or not kv.is_floating_point():
            raise InputError(f"expected floating-point KV of shape {shape}, got {kv.dtype} {tuple(kv.shape)}")

    def stats(self) -> CacheStats:
        """A copy of the counters."""
        return copy.deepcopy(self.counters)

    def health(self) -> Health:
        """Whether the store answers."""
        return self.store.health()

    def close(self) -> None:
        """Close the store."""
        self.store.close()


class MiniConnector:
    """What a connector does for an engine that computes a prompt in steps, over a `MiniCache`."""

    def __init__(self, cache: MiniCache) -> None:
        self.cache = cache
        self.present: list[bool] = []
        self.saved = 0

    def look_up(self, tokens: list[int]) -> int:
        """Before a request: how many of its tokens can be loaded."""
        self.present = [value is not None for value in self.cache.store.get_many(self.cache.keys(tokens))]
        self.saved = 0
        return usable_tokens(self.present, len(tokens), self.cache.B)

    def after_step(self, tokens: list[int], kv: Tensor, computed: int, scheduled: int, failed: list[int]) -> list[int]:
        """After a step: save the blocks that it filled; return their numbers. The KV of failed blocks is not there."""
        blocks = blocks_to_save(computed, scheduled, self.saved, self.present, self.cache.B)
        chosen, whole = trusted_blocks(blocks, failed), (computed + scheduled) // self.cache.B
        self.present += [False] * (whole - len(self.present))
        for i in chosen:
            stop = (i + 1) * self.cache.B
            self.cache.save(tokens[:stop], kv[:, :, :, :stop], i * self.cache.B)
            self.present[i] = True
        for i in failed:
            self.present[i] = False  # it is computed and saved again
        self.saved = min([whole, *failed])
        return chosen
