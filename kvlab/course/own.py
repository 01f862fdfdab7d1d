"""The demo with a learner's `mykv.py`: their cache, their functions, and a check of each.

The real model answers prompts without a cache and with the learner's. A function whose check fails is
replaced by the course's, and the demo fails and says why.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import fakeredis
import redis
import torch

from kvlab.cache import DistributedKVCache, KVCache
from kvlab.core.keys import KVSpec
from kvlab.course.exercises import mykv, registry
from kvlab.course.exercises.engine import Exercise, Verdict, grade
from kvlab.course.race import OurPlanner, race
from kvlab.engine import generate
from kvlab.engine.pages import PagePool
from kvlab.errors import ConfigError, InputError
from kvlab.lab.demo import NEW_TOKENS, SUFFIX, TTL_S, Say
from kvlab.lab.replay import Hits
from kvlab.lab.timing import NOISY_BEYOND, time_rounds
from kvlab.lab.traces import Request
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of
from kvlab.stores import MemoryStore
from kvlab.stores.url import shown

PREFIXES = (128, 512, 2048)
BESIDE = {
    "hit_rate": "the demo's table",
    "causal_attention": "the demo's model",
    **dict.fromkeys(("keep", "load", "answer_from"), "the demo's first cache"),
    **dict.fromkeys(("ring_nodes", "read_batch"), "the demo's ring of servers"),
    **dict.fromkeys(("choose_worker", "resume"), "the demo's two workers"),
    "next_inputs": "the demo's engine",
    "hit_rates": "the demo's report",
}
"""What the demo runs that is in no class of the cache. The classes use the other `mykv.PARTS`; the rest is checked."""


@dataclass
class Own:
    """What a learner's file has.

    Attributes:
        file: where it is.
        module: the file, imported. It has a cache: the course's if the learner's file has none. The course's
            functions replace those whose check failed.
        verdicts: the check of each exercise that the file has a function for.
        calls: how often each function was called since it was loaded.
        printed: what the functions printed. It is not shown between the lines of the demo.
    """

    file: Path
    module: ModuleType
    verdicts: dict[Exercise, Verdict]
    calls: Counter[str] = field(default_factory=Counter)
    printed: io.StringIO = field(default_factory=io.StringIO)

    @property
    def ok(self) -> bool:
        """Whether every function that the file has passed its check."""
        return all(verdict.state == "right" for verdict in self.verdicts.values())

    def has(self, name: str) -> bool:
        """Whether a function is the learner's own, and right."""
        return any(e.name == name and verdict.state == "right" for e, verdict in self.verdicts.items())

    def whose(self) -> dict[str, list[str]]:
        """The names of all functions that take part: yours, those of yours that were only checked, and ours."""
        right = sorted(e.name for e in self.verdicts if self.has(e.name))
        return {
            "yours": [name for name in right if self.calls[name]],
            "checked": [name for name in right if not self.calls[name]],
            "ours": sorted({*mykv.PARTS, *self.calls} - set(right)),
        }


def load(path: str | Path) -> Own:
    """Import a learner's file, check each of its functions, and count their calls from now on.

    Raises:
        InputError: there is no such file, it does not import, or it has nothing of the course in it.
    """
    file = mykv.find(path)
    module = mykv.load_answers(file)
    verdicts = {
        e: grade(e, function) for e in registry.ALL if (function := mykv.own_function(module, e.name)) is not None
    }
    if cache_class(module) is None:
        if not verdicts:
            names = ", ".join(e.name for e in registry.ALL)
            raise InputError(f"expected functions of the course's exercises in {file}, found none of {names}")
        module = _completed(file)
    own = Own(file, module, verdicts)
    for exercise, verdict in verdicts.items():
        if verdict.state != "right":
            setattr(module, exercise.name, exercise.reference)
    for name in {*mykv.PARTS, *(e.name for e in registry.ALL)} & vars(module).keys():
        setattr(module, name, _counted(getattr(module, name), name, own))
    return own


def cache_class(module: ModuleType) -> type[KVCache] | None:
    """The `KVCache` that a learner's file defines, if it defines one."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return next((c for c in classes if issubclass(c, KVCache)), None)


def _completed(file: Path) -> ModuleType:
    """The learner's functions with the course's cache around them."""
    future = "from __future__ import annotations"
    lines = file.read_text("utf-8").splitlines()
    first = [line for line in lines if line.startswith("from __future__ ")]  # Python wants these at the top
    header = mykv.HEADER.replace(future, "\n".join(dict.fromkeys([future, *first])))
    rest = [line for line in lines if line not in first]
    with tempfile.TemporaryDirectory(prefix="kvlab-") as folder:
        whole = Path(folder) / "mykv.py"
        whole.write_text(mykv.whole("\n".join([header, *rest])), "utf-8")
        return mykv.load_answers(whole)


def run(path: str | Path, store: str, say: Say = print) -> dict[str, Any]:
    """Run the demo with the learner's file against the store with this URL. Each line of output is passed to `say`.

    Raises:
        InputError: the file cannot be used; see `load`.
        ConfigError: the store has a URL that the learner's cache cannot use.
    """
    own = load(path)
    say(f"file:    {own.file}")
    for exercise, verdict in own.verdicts.items():
        say(verdict.text)
        if verdict.state != "right":
            say(f"  (the demo runs with ours in place of your {exercise.name})")
    model, sample = load_model(), held_out_tokens(Tokenizer())
    if own.has("causal_attention"):
        model.attend = own.module.causal_attention
    rate_of = _function(own, "hit_rate")
    parts_right = [
        part(own, model, sample, say)
        for part in (
            *(_run_first_cache, _run_pool, _run_tiers, _run_planner, _run_ring),
            *(_run_scheduler, _run_connector, _run_report),
        )
    ]
    rows, salt = [], os.urandom(16)  # no hit comes from an older run
    with _cache(own, store, spec_of(model), salt) as cache:
        say(f"cache:   {type(cache).__name__} over {shown(store)}, blocks of {cache.block_tokens} tokens")
        say(f"{'prefix':>8} {'cold':>9} {'warm':>9} {'faster':>8} {'hit rate':>9} {'same tokens':>12}")
        for n in PREFIXES:
            prompt = sample[: n + SUFFIX]
            rows.append(_measure(model, prompt, cache, rate_of))
            say(_line(rows[-1]))
        readable = _package_reads(cache, prompt, salt)
    say("(faster: the median over the rounds of cold / warm)")
    if any(abs(row["aa_ratio"] - 1) > NOISY_BEYOND for row in rows):
        say("This machine was busy: two measurements of the same work differ by more than 10 %.")
    for owner, names in own.whose().items():
        if owner == "checked" and not names:
            continue
        counted = [f"{name} ({own.calls[name]} calls)" if own.calls[name] else name for name in names]
        note = " (right; this cache does not call them)" if owner == "checked" else ""
        say(f"{owner + ':':8} {', '.join(counted) or 'none'}{note}")
    say(f"kvlab's own cache reads what was written: {readable}")
    if lines := len(own.printed.getvalue().splitlines()):
        say(f"(your functions printed {lines:,} lines, which are not shown here)")
    ok = (
        own.ok and all(parts_right) and readable and all(row["tokens_equal"] and row["hit_rate"] == 1.0 for row in rows)
    )
    wrong = ", ".join(f"{e.number} {e.name}" for e, verdict in own.verdicts.items() if verdict.state != "right")
    failed = f"FAILED: {wrong}; see the lines at the top" if wrong else "FAILED: see the lines above"
    say("Everything works." if ok else failed)
    checks = {exercise.name: verdict.state for exercise, verdict in own.verdicts.items()}
    return {"ok": ok, "checks": checks, "calls": dict(own.calls), "rows": rows, "package_reads": readable}


def _whose(own: Own, *names: str) -> str:
    """Whose part of the demo this is: the learner's if one of its functions is."""
    return "your" if any(own.has(name) for name in names) else "the course's"


def _function(own: Own, name: str) -> Callable[..., Any]:
    """The learner's function if it is right, else the course's."""
    function: Callable[..., Any] = getattr(own.module, name) if own.has(name) else registry.find(name).reference
    return function


def _run_first_cache(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Answer two prompts with the cache of lesson 01, a dict, if the learner wrote a part of it; say what came out.

    Returns:
        Whether the second prompt loaded all full blocks of their common prefix, and its next token is that of a
        run without a cache.
    """
    names = ("answer_from", "keep", "load")
    if not any(own.has(name) for name in names):
        return True
    answer_from, keep, load = (_function(own, name) for name in names)
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    shared = sample[:512]
    for prompt in (shared + sample[600:616], shared + sample[700:716]):
        kv = model.new_kv(len(prompt)).fill_(torch.nan)
        cached = load(kept, prompt, kv, 64)
        logits = answer_from(model, prompt, kv, cached)
        keep(kept, prompt, kv, 64)
    same = int(logits.argmax()) == generate(model, prompt, 1).tokens[0]
    say(f"lesson 01: a dict as cache loads {cached} of {len(prompt)} tokens of a second prompt, same token: {same}")
    return same and cached == len(shared)


def _run_pool(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Answer three prompts with the learner's pool of pages, which has room for the KV of one; say what came out.

    Returns:
        Whether the second prompt shares the full blocks of its prefix, the pool evicts for the third and has all
        pages back in the end, and all next tokens are those of a run without a pool.
    """
    made: Any = getattr(own.module, "MiniPool", None)
    if made is None:
        return True
    keys_of = getattr(own.module, "block_keys", registry.find("block_keys").reference)
    pool, shared = made(model, pages=40), sample[:512]
    filled, right = [], True
    for prompt in (shared + sample[600:616], shared + sample[700:716], sample[1000:1528]):
        keys = keys_of(prompt, bytes(32), 64)
        table = pool.start(keys)
        filled.append(len(table.pages) * pool.page_tokens)
        logits = model(torch.tensor([prompt[filled[-1] :]]), table, filled[-1], last_only=True)
        right &= int(logits[0, -1].argmax()) == generate(model, prompt, 1).tokens[0]
        pool.end(table, keys)
    kept = 4 * len(pool.blocks)
    whole = sorted(pool.refs) == [0] * (40 - kept) + [1] * kept
    say(
        f"lesson 02: a pool of 40 pages shares {filled[1]} of {len(shared) + 16} tokens with a second prompt, "
        f"same tokens: {right}, no page lost: {whole}"
    )
    return right and whole and filled == [0, len(shared), 0]


def _run_tiers(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Answer prompts with host memory in front of a Redis in this process; say what came out.

    Returns:
        Whether a second request of a prompt is served by host memory and then written, and a third worker finds it
        in the store.
    """
    made: Any = getattr(own.module, "MiniTiers", None)
    if made is None:
        return True
    server, prompt = fakeredis.FakeServer(), sample[:528]
    spec, salt = spec_of(model), os.urandom(16)
    redis_of: Any = own.module.MiniRedis
    cache_of: Any = cache_class(own.module)
    caches = [cache_of(made(redis_of(fakeredis.FakeRedis(server=server)), room=20), spec, salt=salt) for _ in range(2)]
    results = [generate(model, prompt, 1, caches[worker]) for worker in (0, 0, 1)]
    cached = [result.cached_tokens for result in results]
    same = {result.tokens[0] for result in results} == {generate(model, prompt, 1).tokens[0]}
    say(
        f"lesson 06: three requests load {cached} tokens: from nowhere, from host memory, and by a second worker "
        f"from the store; same token: {same}"
    )
    return same and cached == [0, 512, 512]


def _run_planner(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Let the learner's planner serve requests on a virtual clock; say how it compares with kvlab's.

    Returns:
        Whether its plans take at most 1.5 times as long as the best ones.
    """
    made: Any = getattr(own.module, "MiniPlanner", None)
    if made is None:
        return True
    yours, ours = race(made()), race(OurPlanner())
    whose = _whose(own, "fetch_seconds", "best_front")
    say(
        f"lesson 06: on a wire that becomes slow and fast again, {whose} planner takes "
        f"{yours:.2f} times as long as the best choices, kvlab's {ours:.2f} times"
    )
    return yours < 1.5


def _run_ring(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Keep each record on two of four servers by the learner's ring, lose a server and read; say what came out.

    Returns:
        Whether exactly the records of the lost server are missing, and the next servers on the ring have them.
    """
    if not any(own.has(name) for name in ("ring_nodes", "read_batch")):
        return True
    ring_nodes, read_batch = _function(own, "ring_nodes"), _function(own, "read_batch")
    cache_of: Any = cache_class(own.module)
    cache: Any = cache_of(own.module.MiniRedis(fakeredis.FakeRedis()), spec_of(model))
    prompt = sample[: 16 * cache.block_tokens + 1]
    generate(model, prompt, 1, cache)
    keys = cache.keys(prompt)
    records = dict(zip([b"kv:" + key for key in keys], cache.store.get_many(keys), strict=True))
    servers = {name: fakeredis.FakeServer() for name in "ABCD"}
    clients = {name: fakeredis.FakeRedis(server=server) for name, server in servers.items()}
    ring = sorted((_place(f"{name}{i}".encode()), name) for name in servers for i in range(16))
    points, owners = [point for point, _ in ring], [name for _, name in ring]
    kept = {name: ring_nodes(points, owners, _place(name), 2) for name in records}
    for name, nodes in kept.items():
        for node in nodes:
            clients[node].set(name, records[name])
    lost = next(iter(kept.values()))[0]
    servers[lost].connected = False
    found = read_batch(clients, list(kept), [nodes[0] for nodes in kept.values()], 60_000)
    missing = [name for name, value in zip(kept, found, strict=True) if value is None]
    right = bool(found == [None if nodes[0] == lost else records[name] for name, nodes in kept.items()])
    again = read_batch(clients, missing, [kept[name][1] for name in missing], 60_000)
    right &= bool(again == [records[name] for name in missing])
    say(
        f"lesson 07: of {len(kept)} records on a ring of four servers {len(missing)} are missing when one is lost, the "
        f"next servers have these, all values right: {right}"
    )
    return right


def _place(name: bytes) -> int:
    """Where a name is on the ring."""
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "little")


def _run_scheduler(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Serve requests with two of the learner's schedulers, one of which is given up halfway; say what came out.

    Returns:
        Whether all answers are those of a run without a scheduler, and batches were made.
    """
    made: Any = getattr(own.module, "MiniScheduler", None)
    if made is None:
        return True
    workers = [made(model, PagePool(model, 40), 48) for _ in range(2)]
    work, prompts, new = [0.0, 0.0], {f"r{i}": sample[40 * i : 40 * i + 16 * (1 + i % 4)] for i in range(8)}, 12
    for name, prompt in prompts.items():
        chosen = own.module.choose_worker(4, [0, 0], work, 0.1)
        work[chosen] += len(prompt)
        workers[chosen].submit(name, prompt, new)
    dead, alive = workers
    steps = [alive.step(), *(dead.step() for _ in range(5))]
    lost = [(name, request["tokens"][len(prompts[name]) :]) for name, request in dead.running.items()]
    for name, given in [*lost, *((name, []) for name in dead.waiting)]:
        tokens, remaining = own.module.resume(prompts[name], given, new, model.config.vocab_size)
        alive.submit(name, tokens, remaining)
    steps += alive.run()
    answers = {**dead.answers, **alive.answers}
    same = all(
        answers.get(name) == prompt + generate(model, prompt, new, stop_at_eos=False).tokens
        for name, prompt in prompts.items()
    )
    together = max(map(len, steps))
    say(
        f"lesson 08: {len(prompts)} requests in {len(steps)} steps, up to {together} in one; {len(lost)} went on "
        f"elsewhere when a worker was lost; same tokens: {same}"
    )
    return same and together > 1 and bool(lost)


def _run_connector(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Let the learner's connector serve a small engine, with a block that is lost between look-up and load.

    Returns:
        Whether what the engine stores afterwards gives the tokens of a run without a cache.
    """
    made: Any = getattr(own.module, "MiniConnector", None)
    if made is None:
        return True
    cache_of: Any = cache_class(own.module)
    cache: Any = cache_of(own.module.MiniRedis(fakeredis.FakeRedis()), spec_of(model), salt=os.urandom(16))
    prompt = sample[:400]
    generate(model, prompt[:256], 1, cache)  # four blocks
    connector, found = made(cache), []
    for lost in ([cache.keys(prompt)[0]], [], []):
        found.append(connector.look_up(prompt))
        for key in lost:
            cache.store.client.delete(b"kv:" + key)
        _engine_step(own, model, cache, connector, prompt, found[-1])
    stored, computed = (model.new_kv(384)[:, :, 0] for _ in range(2))
    model(torch.tensor([prompt[:384]]), computed.unsqueeze(2), last_only=True)
    right = cache.load(prompt, 0, 384, stored) == 384 and torch.allclose(stored, computed, atol=1e-3)
    say(
        f"lesson 09: {_whose(own, 'usable_tokens', 'next_inputs', 'blocks_to_save', 'trusted_blocks')} connector finds "
        f"{found} of {len(prompt)} tokens for an engine whose first load fails; what it stored is right: {right}"
    )
    return right and found == [256, 384, 384]


def _run_report(own: Own, model: Llama, sample: list[int], say: Say) -> bool:
    """Judge the learner's cache with the learner's report: twelve requests of four groups, without it and with it.

    Returns:
        Whether the hit rates are those that kvlab counts, and the ends of the interval are in order.
    """
    made: Any = getattr(own.module, "MiniReport", None)
    if made is None:
        return True
    cache_of: Any = cache_class(own.module)
    cache: Any = cache_of(own.module.MiniRedis(fakeredis.FakeRedis()), spec_of(model), salt=os.urandom(16))
    groups = [f"{i % 4}" for i in range(12)]
    prompts = [sample[300 * int(group) :][:280] + sample[5000 + 20 * i :][:20] for i, group in enumerate(groups)]
    cold, warm = ([generate(model, prompt, 1, how) for prompt in prompts] for how in (None, cache))
    due = [20.0 * i for i in range(len(prompts))]
    without, with_it = (made(due, [1000 * answer.ttft_s for answer in way], groups) for way in (cold, warm))
    requests = [(answer.prompt_tokens, answer.cached_tokens // cache.block_tokens) for answer in warm]
    rates, hits = own.module.hit_rates(requests, cache.block_tokens), Hits(cache.block_tokens)
    for tokens, found in requests:
        hits.add(Request(0.0, tokens, 1, range(-(-tokens // cache.block_tokens))), (found,))
    same = all(abs(rates[name] - rate) < 1e-9 for name, rate in hits.rates().items())
    low, high = with_it.times_faster_than(without)
    say(
        f"lesson 10: p95 from when a request was due {without.at(95):.0f} ms without the cache, {with_it.at(95):.0f} "
        f"with it; means {low:.1f} to {high:.1f} times as fast; {rates['tokens']:.0%} of the tokens found, the four "
        f"hit rates as kvlab counts them: {same}"
    )
    return same and low <= high


def _engine_step(own: Own, model: Llama, cache: Any, connector: Any, prompt: list[int], promised: int) -> None:
    """Load what was promised and compute the rest, as an engine does that does not stop when a load fails."""
    kv, B = model.new_kv(len(prompt)), cache.block_tokens
    loaded = cache.load(prompt, 0, promised, kv[:, :, 0, :, :promised])
    failed = list(range(loaded // B, promised // B))
    inputs = own.module.next_inputs(prompt, promised)
    model(torch.tensor([inputs["ids"]]), kv, inputs["positions"][0], last_only=True)
    connector.after_step(prompt, kv[:, :, 0], promised, len(prompt) - promised, failed)
    if failed:  # the engine computes the request again
        model(torch.tensor([prompt[loaded:]]), kv, loaded, last_only=True)
        connector.after_step(prompt, kv[:, :, 0], loaded, len(prompt) - loaded, [])


def _measure(model: Llama, prompt: list[int], cache: KVCache, rate_of: Callable[..., float]) -> dict[str, Any]:
    """One prompt without a cache and with a full one: tokens, hit rate over full blocks, time to first token."""
    cold = generate(model, prompt, NEW_TOKENS)
    generate(model, prompt, NEW_TOKENS, cache)  # fills the cache
    warm = generate(model, prompt, NEW_TOKENS, cache)
    times = time_rounds({"cold": lambda: generate(model, prompt, 1), "warm": lambda: generate(model, prompt, 1, cache)})
    return {
        "prefix_tokens": len(prompt) - SUFFIX,
        "cold_ms": times.median_ms("cold"),
        "warm_ms": times.median_ms("warm"),
        "speedup": times.ratio("cold", "warm"),
        "hit_rate": rate_of([(len(prompt), warm.cached_tokens)], cache.block_tokens),
        "tokens_equal": warm.tokens == cold.tokens,
        "aa_ratio": times.aa_ratio,
    }


def _line(row: dict[str, Any]) -> str:
    times = f"{row['cold_ms']:>6.1f} ms {row['warm_ms']:>6.1f} ms {row['speedup']:>7.1f}x"
    return f"{row['prefix_tokens']:>8} {times} {row['hit_rate']:>9.0%} {row['tokens_equal']!s:>12}"


def _counted(function: Callable[..., Any], name: str, own: Own) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **settings: Any) -> Any:
        own.calls[name] += 1
        with contextlib.redirect_stdout(own.printed):
            return function(*args, **settings)

    return counted


def _cache(own: Own, store: str, spec: KVSpec, salt: bytes) -> KVCache:
    """The learner's cache over a Redis."""
    made: Any = cache_class(own.module)
    cache: KVCache = made(own.module.MiniRedis(_client(store), ttl_s=TTL_S), spec, salt=salt)
    if not cache.health().ok:
        raise InputError(f"expected a Redis that answers at {shown(store)}: {cache.health().detail}")
    return cache


def _client(store: str) -> redis.Redis:
    if store.startswith("fakeredis://"):
        import fakeredis

        return fakeredis.FakeRedis()
    if not store.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("expected redis://, rediss://, unix:// or fakeredis:// for a learner's cache")
    return redis.Redis.from_url(store, protocol=2, socket_timeout=5.0)


def _package_reads(cache: KVCache, prompt: Sequence[int], salt: bytes) -> bool:
    """Whether the package's cache finds the same KV in what the learner's cache has stored."""
    mini: Any = cache
    keys = mini.keys(prompt)
    values = mini.store.get_many(keys)
    if None in values:
        return False
    copy = MemoryStore()
    copy.put_many(keys, values)
    stop = len(keys) * cache.block_tokens
    shape = (mini.spec.layers, 2, mini.spec.heads, stop, mini.spec.head_dim)
    theirs, ours = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    settings: dict[str, Any] = {"precision": "fp32", "salt": salt, "block_tokens": cache.block_tokens}
    with DistributedKVCache(store=copy, model=mini.spec, **settings) as package:
        both = package.load(prompt, 0, stop, ours) == cache.load(prompt, 0, stop, theirs) == stop
    return both and torch.equal(theirs, ours)
