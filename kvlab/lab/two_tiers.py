"""Block hits of two tiers, inclusive or exclusive, on a stream of requests. Only keys move, no KV.

The rules are those of `kvlab.engine.tiers`: a device hit is a use of the host's copy too, a host hit is promoted to
the device, and with exclusive tiers a block that leaves the device goes to host memory, and only then.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from kvlab.core.policies import POLICIES, Policy


def hit_rate(
    requests: Iterable[Sequence[Hashable]],
    device: int,
    host: int,
    exclusive: bool,
    policy: str = "lru",
    use_below: bool = True,
) -> float:
    """Return block hits / blocks. A hit is a leading block of its request that one of the tiers has.

    Args:
        requests: the keys of each request's blocks, in the order of its tokens. A key stands for its whole prefix.
        device, host: the most blocks of each tier.
        use_below: whether a device hit is a use of an inclusive host's copy.
    """
    on_device: Policy[Hashable] = POLICIES[policy](device)
    on_host: Policy[Hashable] = POLICIES[policy](host)
    hits = total = 0
    for keys in requests:
        total += len(keys)
        for key in keys:
            if key not in on_device and key not in on_host:
                break
            hits += 1
        for key in keys:
            _use(key, on_device, on_host, exclusive, use_below)
    return hits / total if total else 0.0


def _use(key: Hashable, device: Policy[Hashable], host: Policy[Hashable], exclusive: bool, use_below: bool) -> None:
    if exclusive:
        host.remove(key)
        for evicted in device.admit(key):
            host.access(evicted)
    elif not device.access(key) or use_below:
        host.access(key)
