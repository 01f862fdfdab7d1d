"""The command line: `python -m kvlab demo`, `doctor` and `bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvlab.errors import KVLabError

if TYPE_CHECKING:
    from kvlab.lab.demo import Parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 good, 1 something is untrue or broken, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="kvlab", description="A distributed KV cache for LLM serving.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the whole system once: cold against warm on the real model")
    demo.add_argument("--redis", metavar="URL", default=_default_store(), help="a store, say redis://localhost:6379")
    demo.add_argument("--impl", metavar="FILE", help="run with the functions of this file, say work/mykv.py")
    demo.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="check this machine; exit 1 on a problem")
    doctor.set_defaults(run=_doctor)
    _add_bench(commands.add_parser("bench", help="measure one part of the system on this machine"))
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except KVLabError as error:
        print(f"kvlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _default_store() -> str:
    """The Redis that the surroundings name (docker-compose.yml does), else one in this process."""
    return os.environ.get("KVLAB_REDIS_URL") or "fakeredis://"


def _demo(args: argparse.Namespace) -> int:
    from kvlab.lab import demo

    parts = _parts(args.impl) if args.impl else demo.Parts()
    say = (lambda _: None) if args.json else (lambda line: print(line, flush=True))
    result = demo.run(args.redis, parts, say)
    if args.json:
        print(json.dumps(result.as_json(), indent=2))
    return 0 if result.ok else 1


def _add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="bench", required=True)
    hashing = what.add_parser("hash", help="nanoseconds a token for block keys, beside bare SHA-256")
    codec = what.add_parser("codec", help="bytes, speed and quality of every codec on real KV (minutes)")
    codec.add_argument("--windows", type=_positive, default=96, help="windows of text for the quality (default 96)")
    codec.add_argument("--redis", metavar="URL", help="measure the wire to this server too")
    fuzz = what.add_parser("fuzz", help="decode records that were damaged or forged; exit 1 if one gets through")
    fuzz.add_argument("--n", type=_positive, default=100_000, help="number of cases (default 100,000)")
    fuzz.add_argument("--seed", type=int, default=0)
    wire = what.add_parser("wire", help="GB/s to a Redis and back (writes about 300 MB there, and deletes it)")
    wire.add_argument("--redis", metavar="URL", help="this server, instead of one started here")
    shards = what.add_parser("shards", help="256 records over a Redis Cluster of three nodes, beside one server")
    failover = what.add_parser("failover", help="seconds until a replica replaces a lost master (minutes)")
    for one in (hashing, codec, fuzz, wire, shards, failover):
        one.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        one.set_defaults(run=_bench)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {number}")
    return number


def _bench(args: argparse.Namespace) -> int:
    from kvlab.course.recorded import save_recording
    from kvlab.lab import tables
    from kvlab.lab.bench import codec as bench_codec
    from kvlab.lab.bench import failover as bench_failover
    from kvlab.lab.bench import fuzz as bench_fuzz
    from kvlab.lab.bench import hash as bench_hash
    from kvlab.lab.bench import shards as bench_shards
    from kvlab.lab.bench import wire as bench_wire

    if args.bench == "hash":
        result = bench_hash.run()
    elif args.bench == "codec":
        result = bench_codec.run(args.windows, redis=args.redis)
    elif args.bench == "wire":
        result = bench_wire.run(args.redis)
    elif args.bench == "shards":
        result = bench_shards.run()
    elif args.bench == "failover":
        result = bench_failover.run()
        if os.environ.get("KVLAB_RECORD"):  # notebook 07 shows it
            save_recording("07_node_timeout", {"seconds": result["killed"]})
    else:
        result = bench_fuzz.run(args.n, args.seed)
    print(json.dumps(result, indent=2) if args.json else tables.text(result))
    return 1 if any(result.get(bad) for bad in ("wrong_tensors", "uncaught", "over_allocated")) else 0


def _parts(file: str) -> Parts:
    """The learner's functions where their file has them, the package's for the rest."""
    from kvlab.course.exercises import load_answers
    from kvlab.lab.demo import Parts

    answers = load_answers(file)
    own = {name: getattr(answers, name) for name in ("causal_attention", "hit_rate") if hasattr(answers, name)}
    return Parts(**own, learners=tuple(own))


def _doctor(_: argparse.Namespace) -> int:
    from kvlab.course.doctor import run

    return run()
