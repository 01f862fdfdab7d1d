"""Time from the loss of a cluster master to the first hit on one of its keys, by node timeout.

python -m kvlab bench failover --json

Each round starts a cluster of three masters with replicas in sync and kills or freezes one master.
Then it reads one of this master's keys, with pauses of 20 ms, until the read is a hit. The
benchmark takes minutes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from typing import Any

from kvlab.errors import KVLabError
from kvlab.lab.machine import describe_machine, versions
from kvlab.stores import RedisStore
from kvlab.stores.redis.store import KEY_PREFIX
from kvlab.testbed.cluster import RedisCluster

NODE_TIMEOUTS_MS = (1000, 2000, 5000, 15000)  # 15000 is Redis' default
ROUNDS = 3
ABOUT = (
    "killed, frozen: by node timeout in ms, seconds from the loss of a master to the first hit on one of its keys, one "
    "value per round; others: number of hits and misses (by reason) of the other masters' keys in this time"
)
EVERY_S = 0.02
GIVE_UP_S = 90.0
KEYS = 60


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """Time failovers after a kill for each node timeout, and after a freeze for a node timeout of 2 s.

    Returns:
        `killed`: by node timeout in ms, seconds from the kill to the first hit, one value per round.
        `frozen`: the same after SIGSTOP. `others`: reads of the other masters' keys in this time,
        over all rounds: number of hits ("hit") and of misses by reason.

    Raises:
        KVLabError: redis-server is not installed, a value is wrong, or no replica takes over within 90 s.
    """
    others: Counter[str] = Counter()
    killed = {str(ms): [_seconds(ms, False, others) for _ in range(rounds)] for ms in NODE_TIMEOUTS_MS}
    frozen = {"2000": [_seconds(2000, True, others) for _ in range(rounds)]}
    return {
        "about": ABOUT,
        "killed": killed,
        "frozen": frozen,
        "others": dict(others),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _seconds(node_timeout_ms: int, freeze: bool, others: Counter[str]) -> float:
    keys = [os.urandom(32) for _ in range(KEYS)]
    with RedisCluster(node_timeout_ms=node_timeout_ms) as cluster, RedisStore(cluster.url) as store:
        if store.put_many(keys, keys) != KEYS:
            raise KVLabError(f"the store did not accept a value: {dict(store.stats().drops)}")
        time.sleep(0.5)  # for replication
        victim = cluster.master_of(KEY_PREFIX + keys[0])
        rest = [key for key in keys if cluster.master_of(KEY_PREFIX + key) is not victim]
        with contextlib.ExitStack() as stack:
            stack.enter_context(victim.paused()) if freeze else victim.kill()
            begin = time.perf_counter()
            while True:
                reasons: list[str] = []
                got = store.get_many([keys[0], *rest], reasons=reasons)
                if any(value is not None and value != key for key, value in zip([keys[0], *rest], got, strict=True)):
                    raise KVLabError("the store returned a wrong value")
                others.update(reason or "hit" for reason in reasons[1:])
                passed = time.perf_counter() - begin
                if not reasons[0]:
                    return round(passed, 2)
                if passed > GIVE_UP_S:
                    raise KVLabError(f"no replica took over within {GIVE_UP_S:.0f} s")
                time.sleep(EVERY_S)
