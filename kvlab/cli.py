"""The command line: a table of commands, and what all of them have in common.

A command is one entry of `COMMANDS`: a name, a line of help, options, and a function that takes the
options by name and returns the exit status. What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from kvlab.errors import InputError, KVLabError
from kvlab.lab.streams import accept_any_text

if TYPE_CHECKING:
    from kvlab.lab.demo import Parts

GOOD, BAD, USAGE, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
"""Exit statuses: as asked; something is untrue or out of reach; wrong usage; Ctrl-C; nobody reads the output."""


@dataclass(frozen=True)
class Option:
    """One option of a command; `settings` as `argparse` takes them."""

    flag: str
    help: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command. A name of two words is a command of a group."""

    name: str
    help: str
    run: Callable[..., int]
    options: tuple[Option, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    Every output is possible in every encoding, and nothing that a user can cause ends in a traceback.

    Raises:
        SystemExit: wrong usage (2), or `--help` (0).
    """
    accept_any_text()
    try:
        try:
            options = vars(_parser().parse_args(argv))
            run: Callable[..., int] = options.pop("run")
            return run(**options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has what it wanted, as `head` has
        _drop_what_cannot_be_written()
        return NO_READER
    except (KVLabError, OSError) as error:
        _drop_what_cannot_be_written()
        if sys.stderr is not None:
            print(f"kvlab: {_one_line(str(error))}", file=sys.stderr)
        return BAD


def _one_line(text: str) -> str:
    """The text with line ends and other unprintable characters, of a file's name say, as escapes."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _drop_what_cannot_be_written() -> None:
    """Leave nothing in stdout's buffer that would fail once more when the program ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- the commands -------------------------------------------------------------------------------
def _demo(store: str | None, impl: str | None, json: bool) -> int:
    from kvlab.lab import demo

    parts = demo.Parts() if impl is None else _learners_parts(impl)
    say = (lambda _: None) if json else (lambda line: print(line, flush=True))
    try:
        result = demo.run(_named_store() if store is None else store, parts, say)
    except (KVLabError, OSError):
        raise
    except Exception as error:
        if not parts.learners:
            raise
        names = " and ".join(parts.learners)
        raise InputError(f"with {names} of {impl} the demo fails: {type(error).__name__}: {error}") from error
    if json:
        _print_json(result.as_json())
    return GOOD if result.ok else BAD


def _learners_parts(file: str) -> Parts:
    """The learner's functions where their file has them, the package's for the rest."""
    from kvlab.course.exercises import load_answers
    from kvlab.lab.demo import Parts

    answers = load_answers(file)
    own = {name: getattr(answers, name) for name in ("causal_attention", "hit_rate") if hasattr(answers, name)}
    if not own:
        raise InputError(f"expected causal_attention or hit_rate in {file}, found neither; leave --impl out")
    return Parts(**own, learners=tuple(own))


def _named_store() -> str:
    """The store that the surroundings name (docker-compose.yml does), else one in this process."""
    return os.environ.get("KVLAB_STORE") or "fakeredis://"


def _doctor() -> int:
    from kvlab.course import doctor

    return doctor.run()


def _bench(module: str) -> Callable[..., int]:
    """A command that prints what the `run` of a module returns; bad if that says it is not ok."""

    def run(json: bool, **options: Any) -> int:
        from kvlab.lab import tables

        result = import_module(module).run(**options)
        _print_json(result) if json else print(tables.text(result))
        return GOOD if result.get("ok", True) else BAD

    return run


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


STORE = Option("--store", "a store, say redis://localhost:6379", {"metavar": "URL"})
IMPL = Option("--impl", "run with the functions of this file, say work/mykv.py", {"metavar": "FILE"})
JSON = Option("--json", "print one JSON object and nothing else", {"action": "store_true"})
WINDOWS = Option("--windows", "windows of text for the quality (default 96)", {"type": _count, "default": 96})
CASES = Option("--n", "number of cases (default 100,000)", {"type": _count, "default": 100_000})
SEED = Option("--seed", "another seed, other cases (default 0)", {"type": int, "default": 0})
TRACE = Option("--trace", "replay the block keys of this trace (.jsonl)", {"metavar": "FILE"})

COMMANDS = (
    Command("demo", "the whole system once: cold against warm on the real model", _demo, (STORE, IMPL, JSON)),
    Command("doctor", "check this machine; exit 1 on a problem", _doctor),
    Command(
        "bench hash",
        "nanoseconds a token for block keys, beside bare SHA-256",
        _bench("kvlab.lab.bench.hash"),
        (JSON,),
    ),
    Command(
        "bench codec",
        "bytes, speed and quality of every codec on real KV; with --store its wire too (minutes)",
        _bench("kvlab.lab.bench.codec"),
        (WINDOWS, STORE, JSON),
    ),
    Command(
        "bench fuzz",
        "decode records that were damaged or forged; exit 1 if one gets through",
        _bench("kvlab.lab.fuzz"),
        (CASES, SEED, JSON),
    ),
    Command(
        "bench policies",
        "accesses a second of every eviction policy",
        _bench("kvlab.lab.bench.policies"),
        (TRACE, JSON),
    ),
    Command(
        "bench wire",
        "GB/s to a Redis and back, one started here or --store (writes about 300 MB there, and deletes it)",
        _bench("kvlab.lab.bench.wire"),
        (STORE, JSON),
    ),
    Command(
        "bench shards",
        "256 records over a Redis Cluster of three nodes, beside one server",
        _bench("kvlab.lab.bench.shards"),
        (JSON,),
    ),
    Command(
        "bench failover",
        "seconds until a replica replaces a lost master (minutes)",
        _bench("kvlab.lab.bench.failover"),
        (JSON,),
    ),
)
GROUPS = {"bench": "measure one part of the system on this machine"}


# --- from the table to a parser -----------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the usage, without the login of a URL that stands where none belongs."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"://\S*@", "://***@", message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvlab", description="A distributed KV cache for LLM serving.")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = inner.add_subparsers(required=True, metavar="COMMAND")
        one = groups[group].add_parser(name, help=command.help, description=command.help)
        one.set_defaults(run=command.run)
        for option in command.options:
            one.add_argument(option.flag, help=option.help, **option.settings)
    return parser
