"""Several processes on one folder for a while: is every value right, and does the folder keep its bound?

python tests/faults/soak_files.py --seconds 60 --json > docs/results/soak_files.json

Each process gets, puts, probes and deletes values of a range of keys that is larger than the folder. A value follows
from its key, so that a wrong one shows. Two of the processes are killed and started again all the time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from kvlab.lab.machine import describe_machine, versions
from kvlab.stores import FileStore
from kvlab.stores.files.folder import Folder, Gone

BOUND = 16 << 20
KEYS = 400
MOST = 128 << 10
"""The largest value: all of them take 25 MiB."""
KILLED = 2


def value_of(number: int) -> bytes:
    """The value of a key: its size and its bytes follow from the number."""
    size = 1000 + number * 7919 % (MOST - 1000)
    seed = random.Random(number).randbytes(997)
    return (seed * (size // len(seed) + 1))[:size]


def work(path: str, seed: int, seconds: float, results: Any) -> None:
    """One process."""
    chosen, end = random.Random(seed), time.monotonic() + seconds
    right = [value_of(number) for number in range(KEYS)]
    wrong, raised = 0, Counter[str]()
    with FileStore(path, max_bytes=BOUND, deadline_s=5.0) as store:
        out = [memoryview(bytearray(MOST)) for _ in range(8)]
        while time.monotonic() < end:
            numbers = [chosen.randrange(KEYS) for _ in range(8)]
            keys = [b"%d" % number for number in numbers]
            try:
                got = store.get_many(keys, out if chosen.random() < 0.5 else None)
                wrong += sum(v is not None and v != right[n] for n, v in zip(numbers, got, strict=True))
                missing = [n for n, v in zip(numbers, got, strict=True) if v is None]
                store.put_many([b"%d" % n for n in missing], [right[n] for n in missing])
                store.probe(keys)
                if chosen.random() < 0.05:
                    store.delete_many(keys[:2])
            except Exception as error:
                raised[repr(error)] += 1
        stats = store.stats()
        stats.check()
        results.put(
            {
                "gets": stats.requested,
                "hits": stats.hits,
                "wrong": wrong,
                "raised": dict(raised),
                "misses": dict(stats.misses),
                "drops": dict(stats.drops),
                "evicted": store._janitor.evicted,
                "reaped": store._janitor.reaped,
            }
        )


def run(seconds: float, processes: int = 8) -> dict[str, Any]:
    """`processes` on one folder, and KILLED more that are killed again and again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.soak_files"])  # 40 processes would import everything again
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="kvlab-soak-") as folder:
        path = f"{folder}/store"

        def start(seed: int, for_s: float) -> Any:
            process = context.Process(target=work, args=(path, seed, for_s, results), daemon=True)
            process.start()
            return process

        workers = [start(seed, seconds) for seed in range(processes)]
        killed = [start(1000 + i, 3600.0) for i in range(KILLED)]
        most = kills = miscounts = 0
        found: list[dict[str, Any]] = []
        turn, give_up = time.monotonic(), time.monotonic() + 3 * seconds + 60
        while len(found) < processes:
            assert time.monotonic() < give_up, "a process did not end"
            size, counted = _bytes_in(path)
            most, miscounts = max(most, size), miscounts + (size > counted)
            if time.monotonic() - turn > 1.0:
                turn, place = time.monotonic(), kills % KILLED
                killed[place].kill()
                killed[place].join()
                kills += 1
                killed[place] = start(2000 + kills, 3600.0)
            while not results.empty():
                found.append(results.get())
            time.sleep(0.1)
        for process in (*workers, *killed):
            process.kill()
            process.join()
        with FileStore(path, max_bytes=BOUND, deadline_s=30.0) as store:
            left = _left_over(path)
            store._janitor.sweep(full_since_ns=store._now())
            left_after = _left_over(path)
    together = {name: sum(one[name] for one in found) for name in ("gets", "hits", "wrong", "evicted", "reaped")}
    counters = {
        name: dict(sum((Counter(one[name]) for one in found), Counter())) for name in ("raised", "misses", "drops")
    }
    return {
        "about": "several processes on one folder of files for a while; others beside them are killed every second",
        "seconds": seconds,
        "processes": processes,
        "kills": kills,
        **together,
        **counters,
        "most_mib": round(most / 2**20, 3),
        "bound_mib": BOUND / 2**20,
        "moments_with_more_than_was_counted": miscounts,
        "left_over_files": left,
        "left_over_after_a_sweep": left_after,
        "machine": describe_machine(),
        "versions": versions(),
    }


def _bytes_in(path: str) -> tuple[int, int]:
    """Bytes of all values and of those that are being written, in whole blocks, and what is counted: at one moment."""
    folder = Folder(path)
    try:
        with folder.counting() as count:
            writing = [file.stat() for file in Path(path, ".tmp").iterdir()]
            # What is being written has its size from the beginning, and takes what it has got of it.
            size = sum(512 * status.st_blocks for status in writing) + sum(entry.size for entry in folder.entries())
            return size, count.used
    except (FileNotFoundError, Gone):  # the first process has not made it
        return 0, 0


def _left_over(path: str) -> int:
    return len([*Path(path, ".tmp").iterdir()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = run(args.seconds, args.processes)
    print(json.dumps(result, indent=1) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
