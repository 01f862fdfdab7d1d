"""The command line: `python -m kvlab demo` and `python -m kvlab doctor`."""

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


if __name__ == "__main__":
    sys.exit(main())
