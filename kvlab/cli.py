"""The command line: a table of commands, their parser and their exit statuses.

Each entry of `COMMANDS` has a name, a help line, options and a function. The function takes the
options as keyword arguments and returns the exit status. It imports the modules of its command
when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import kvlab
from kvlab.errors import InputError, KVLabError
from kvlab.lab.streams import accept_any_text

SUCCESS, FAILURE, USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143
"""Exit statuses: success; an error or a failed check; wrong usage; Ctrl-C; the reader of stdout closed it; SIGTERM."""


@dataclass(frozen=True)
class Option:
    """One option of a command. `settings` are keyword arguments of `add_argument`."""

    flag: str
    help: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command. If its name has two words, the first one is the name of its group."""

    name: str
    help: str
    run: Callable[..., int]
    options: tuple[Option, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Any text can be printed in any encoding. Mistakes of the user never cause a traceback.

    Raises:
        SystemExit: the usage is wrong (status 2), or `--help` was given (status 0).
    """
    accept_any_text()
    before = _on_sigterm(_terminate)
    try:
        try:
            known, unknown = _parser().parse_known_args(argv)
            options = vars(known)
            run: Callable[..., int] = options.pop("run")
            parser: _Parser = options.pop("parser")
            if unknown:  # said with the usage of the command, not with the list of all commands
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            return run(**options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout, such as `head`, closed it
        _discard_unwritable_output()
        return BROKEN_PIPE
    except (KVLabError, OSError) as error:
        _discard_unwritable_output()
        if sys.stderr is not None:
            print(f"kvlab: {_one_line(_said(error))}", file=sys.stderr)
        return FAILURE
    finally:
        _on_sigterm(before)


def _on_sigterm(handler: Any) -> Any:
    """Set what SIGTERM does, and return what it did; None changes nothing. Only the main thread may set it."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)


def _terminate(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that a command removes the servers and folders that it made."""
    raise SystemExit(TERMINATED)


def _said(error: Exception) -> str:
    """An error's text; of the system's errors the file and the reason, without Python's number and quotes."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _one_line(text: str) -> str:
    """Escape line ends and other unprintable characters. The name of a file, for example, may contain them."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _discard_unwritable_output() -> None:
    """Flush stdout. If that fails, redirect it to the null device, so that the flush at exit does not fail again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- the commands -------------------------------------------------------------------------------
def _demo(store: str | None, impl: str | None, json: bool) -> int:
    url = _default_store() if store is None else store
    report = (lambda _: None) if json else (lambda line: print(line, flush=True))
    if impl is not None:
        return _learners_demo(impl, url, report, json)
    from kvlab.lab import demo

    result = demo.run(url, say=report)
    if json:
        _print_json(result.as_json())
    return SUCCESS if result.ok else FAILURE


def _learners_demo(file: str, url: str, report: Callable[[str], None], json: bool) -> int:
    from kvlab.course import own

    try:
        result = own.run(file, url, report)
    except (KVLabError, OSError):
        raise
    except Exception as error:  # a learner's class may raise anything
        raise InputError(f"the demo fails with {file}: {type(error).__name__}: {error}") from error
    if json:
        _print_json(result)
    return SUCCESS if result["ok"] else FAILURE


def _progress(impl: str | None) -> int:
    from kvlab.course import progress

    print(progress.report(impl))
    return SUCCESS


def _contracts(impl: str | None, json: bool) -> int:
    from kvlab.course import capstone

    report = capstone.run(impl, (lambda _: None) if json else print)
    if json:
        _print_json(report.as_json())
    return SUCCESS if report.ok else FAILURE


def _default_store() -> str:
    """Return the store URL in `KVLAB_STORE`, which docker-compose.yml sets, or the URL of an in-process store."""
    return os.environ.get("KVLAB_STORE") or "fakeredis://"


def _doctor(engine: str | None, store: str | None, arguments: Sequence[str]) -> int:
    if engine is not None:
        return _engine_doctor(engine, arguments, store)
    if arguments or store is not None:
        raise InputError("expected --engine with a store and arguments, for example: doctor --engine vllm -- MODEL")
    from kvlab.course import doctor

    return doctor.run()


def _engine_doctor(engine: str, arguments: Sequence[str], store: str | None) -> int:
    from kvlab.connectors import doctor

    problems = 0
    for line in doctor.lines(engine, arguments, store):
        print(_one_line(str(line)), flush=True)
        problems += line.status == doctor.PROBLEM
    print(f"problems: {problems}" if problems else "ready")
    return FAILURE if problems else SUCCESS


def _explain(store: str | None, json: bool, **options: Any) -> int:
    from kvlab.lab import explain_file

    found = explain_file.run(store=store or os.environ.get("KVLAB_STORE") or None, **options)
    if json:
        _print_json(found.as_json())
    else:
        for line in explain_file.lines(found):
            print(_one_line(line))
    return SUCCESS


def _bench(module: str) -> Callable[..., int]:
    """Return a command that prints the result of the module's `run`. It fails if the result has a false "ok"."""

    def run(json: bool, **options: Any) -> int:
        from kvlab.lab import tables

        if options.get("store", "") is None and not _default_store().startswith("fakeredis://"):
            options["store"] = _default_store()
        result = import_module(module).run(**options)
        _print_json(result) if json else print(tables.text(result))
        return SUCCESS if result.get("ok", True) else FAILURE

    return run


def _serve(
    workers: int,
    router: str,
    requests: int,
    rate: float,
    store: str | None,
    metrics_port: int | None,
    metrics_address: str,
    json: bool,
) -> int:
    from kvlab.lab import serving, tables

    if store is None and not _default_store().startswith("fakeredis://"):
        store = _default_store()
    result = serving.run(
        workers, router, store, requests, rate, metrics_port, metrics_address, lambda line: print(line, file=sys.stderr)
    )
    _print_json(result) if json else print(tables.text(result))
    return SUCCESS


def _replay(trace: str, block: int | None, ids: str | None, curve: bool, json: bool, **options: Any) -> int:
    from kvlab.lab import replay, tables, traces

    requests = traces.Trace(trace, block, ids=ids)
    if curve:
        if _setup(**options) != replay.Setup():
            raise InputError("expected --curve alone: it is that of LRU on one node, at every capacity")
        result = replay.curve_table(requests)
    else:
        result = replay.replay(requests, requests.block_tokens, _setup(**options)).as_json()
    _print_json(result) if json else print(tables.text(result))
    return SUCCESS


def _simulate(
    trace: str,
    block: int | None,
    ids: str | None,
    costs: str,
    index: str,
    speed: float,
    bucket: float,
    json: bool,
    **options: Any,
) -> int:
    from kvlab.lab import tables, traces
    from kvlab.lab.costs import COSTS
    from kvlab.lab.indexes import INDEXES
    from kvlab.lab.simulate import simulate

    requests = traces.Trace(trace, block, ids=ids)
    for value, names, what in ((costs, COSTS, "costs"), (index, INDEXES, "index")):
        if value not in names:
            raise InputError(f"expected one of {', '.join(names)} as --{what}, got {value!r}")
    arriving = traces.spread(requests, bucket, speed)
    result = simulate(arriving, requests.block_tokens, _setup(**options), COSTS[costs], index).as_json()
    result |= {"costs": costs, "source": COSTS[costs].source}
    _print_json(result) if json else print(tables.text(result))
    return SUCCESS


def _strategies(rounds: int, workload: list[str] | None, predict: bool, predicted: str | None, json: bool) -> int:
    from kvlab.lab import strategies, strategy_runs, tables

    if predicted and (predict or workload or rounds != ROUNDS):
        raise InputError("expected --predicted alone: the file says which workloads and rounds")
    kinds = workload or [*strategies.MADE]
    if sys.stderr is not None:
        long = "about 45 minutes a round" if predicted else f"about {12 * rounds * len(kinds)} minutes"
        print(f"kvlab: this takes {'some minutes' if predict else long}, and prints nothing meanwhile", file=sys.stderr)
    result = strategies.predict(rounds, kinds) if predict else strategy_runs.run(predicted, rounds, kinds)
    _print_json(result) if json else print(tables.text(result))
    return SUCCESS


def _decide(
    trace: str,
    block: int | None,
    ids: str | None,
    shape: str,
    prefill: float | None,
    wire: float,
    prices: str | None,
    json: bool,
    **options: Any,
) -> int:
    from kvlab.lab import decide, decide_inputs, decide_page, reuse, traces
    from kvlab.lab.prices import read_prices

    decide_inputs.sizes(shape)  # its mistakes, and those of the prices, are told before the trace is read
    own = {} if prices is None else read_prices(prices, decide_inputs.USED)
    requests = traces.Trace(trace, block, ids=ids)
    found = reuse.reuse(requests, requests.block_tokens)
    result = decide.decide(found, shape, prefill, wire, own, **options)
    _print_json(result.as_json()) if json else print(_page(decide_page.page(result, Path(trace).name)))
    return SUCCESS


def _page(text: str) -> str:
    return "\n".join(map(_one_line, text.split("\n")))


def _trace_import(
    file: str, out: str, tokenizer: str | None, block: int | None, salt_file: str | None, form: str
) -> int:
    from kvlab.lab.trace_import import import_prompts

    for line in import_prompts(file, out, tokenizer, block, salt_file, form).lines():
        print(_one_line(line))
    return SUCCESS


def _setup(capacity: int | None, tiers: Any, **options: Any) -> Any:
    from kvlab.lab.replay import Setup

    if tiers is None:
        return Setup(device=capacity, **options)
    if capacity is not None:
        raise InputError("expected --capacity or --tiers, got both; --tiers begins with the capacity of the device")
    return Setup(**options, **dict(zip(("device", "host", "store"), tiers, strict=False)))


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 999,999,999,999, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0.000001 to 999999.999999, got {text!r}")
    return float(text)


def _seconds(text: str) -> float:
    return 0.0 if text == "0" else _rate(text)


def _capacity(text: str) -> int | None:
    if text == "0":
        return 0
    return None if text == "inf" else _count(text)


def _capacities(text: str) -> list[int | None]:
    parts = [_capacity(part) for part in text.split(",")]
    if len(parts) not in (2, 3) or None in parts[1:]:
        raise argparse.ArgumentTypeError(f"expected two or three numbers as 6000,12000, got {text!r}")
    return parts


def _share(text: str) -> float:
    if not re.fullmatch(r"[01]?\.?[0-9]{0,9}", text) or not any(map(str.isdigit, text)) or float(text) > 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return float(text)


def _gibs(text: str) -> list[float]:
    return [_rate(part) for part in text.split(",")]


ROUNDS = 3
STORE = Option(
    "--store", "URL of a store, for example redis://localhost:6379 (default: KVLAB_STORE, if set)", {"metavar": "URL"}
)
IMPL = Option("--impl", "use the functions in this file, for example work/mykv.py", {"metavar": "FILE"})
ENGINE = Option(
    "--engine", "the engine whose connector is checked", {"choices": ["vllm", "transformers"], "metavar": "NAME"}
)
ARGUMENTS = Option(
    "arguments",
    "after --engine NAME --: for vllm the arguments of vllm serve, for transformers the folder of a model",
    {"nargs": "*", "metavar": "ARGUMENT"},
)
JSON = Option("--json", "print one JSON object and nothing else", {"action": "store_true"})
WINDOWS = Option("--windows", "text windows for the quality measurement (default 96)", {"type": _count, "default": 96})
CASES = Option("--n", "number of cases (default 100,000)", {"type": _count, "default": 100_000})
SEED = Option("--seed", "seed of the random cases (default 0)", {"type": int, "default": 0})
WORKERS = Option("--workers", "worker processes (default 2)", {"type": _count, "default": 2})
ROUTER = Option(
    "--router",
    "round_robin, least_loaded, longest_prefix or cost (default)",
    {"choices": ["round_robin", "least_loaded", "longest_prefix", "cost"], "default": "cost", "metavar": "NAME"},
)
REQUESTS = Option("--requests", "number of requests (default 64)", {"type": _count, "default": 64})
RATE = Option("--rate", "requests a second (default 8)", {"type": _rate, "default": 8.0, "metavar": "N"})
METRICS = (
    Option(
        "--metrics-port",
        "answer Prometheus meanwhile: this process here, each worker at one of the next ports",
        {"type": _count, "metavar": "PORT"},
    ),
    Option(
        "--metrics-address",
        "where these ports listen (default 127.0.0.1)",
        {"default": "127.0.0.1", "metavar": "ADDRESS"},
    ),
)
TRACE = Option("--trace", "replay the block keys in this trace file (.jsonl)", {"metavar": "FILE"})
RETENTION = (
    Option(
        "--share",
        "pin what so many of the trace's requests begin with (default 0.1)",
        {"type": _share, "default": 0.1, "metavar": "N"},
    ),
    Option(
        "--lease",
        "seconds that a pin lasts after a use (default 3600)",
        {"type": _rate, "default": 3600.0, "metavar": "S"},
    ),
    Option(
        "--every",
        "seconds between two requests of a rare job that is added and pinned (default 600)",
        {"type": _rate, "default": 600.0, "metavar": "S"},
    ),
)
FILE = Option(
    "trace", "a file with one request a line, in the form of Mooncake, Qwen-Bailian or kvlab", {"metavar": "TRACE"}
)
BLOCK = Option(
    "--block", "tokens in a block of the trace (default: that of its form)", {"type": _count, "metavar": "N"}
)
IDS = Option(
    "--ids",
    "what an id of the trace stands for: prefix (a block and all before it) or content (one block)",
    {"choices": ["prefix", "content"], "metavar": "NAME"},
)
CACHES = (
    Option(
        "--policy", "fifo, lru (default), lfu, s3fifo, arc or belady (a bound)", {"default": "lru", "metavar": "NAME"}
    ),
    Option(
        "--capacity",
        "blocks that each node has room for, 0 for no cache (default inf)",
        {"type": _capacity, "metavar": "BLOCKS"},
    ),
    Option(
        "--tiers",
        "instead of --capacity: blocks on the device and in host memory of each node, as 6000,12000; "
        "a third number is a store that all nodes share",
        {"type": _capacities, "metavar": "D,H[,S]"},
    ),
    Option(
        "--mode",
        "inclusive (default): host memory has copies of what is on the device; or exclusive",
        {"default": "inclusive", "metavar": "NAME"},
    ),
    Option(
        "--ttl", "seconds without use after which a block is gone", {"type": _rate, "metavar": "S", "dest": "ttl_s"}
    ),
    Option("--nodes", "number of nodes (default 1)", {"type": _count, "default": 1, "metavar": "N"}),
    Option(
        "--router",
        "round_robin (default), least_loaded, longest_prefix, cost, dynamo, lmetric, sglang or llmd",
        {"default": "round_robin", "metavar": "NAME"},
    ),
)
CURVE = Option("--curve", "print the hits of an LRU cache of every capacity instead", {"action": "store_true"})
COSTS = Option(
    "--costs", "what work costs (default llama8b_h100, computed)", {"default": "llama8b_h100", "metavar": "NAME"}
)
INDEX = Option(
    "--index",
    "what the router knows of the caches: exact (default), sent, events or naive",
    {"default": "exact", "metavar": "NAME"},
)
SPEED = Option(
    "--speed", "let requests come so many times as fast (default 1)", {"type": _rate, "default": 1.0, "metavar": "N"}
)
BUCKET = Option(
    "--bucket",
    "spread requests of one time over so many seconds; 3 for the traces of Mooncake (default 0)",
    {"type": _seconds, "default": 0.0, "metavar": "S"},
)
STRATEGIES = (
    Option("--rounds", "seeds of each workload (default 3)", {"type": _count, "default": ROUNDS, "metavar": "N"}),
    Option(
        "--workload",
        "agentic, chat, structured or unique; may be given several times (default: all)",
        {"action": "append", "choices": ["agentic", "chat", "structured", "unique"], "metavar": "NAME"},
    ),
    Option("--predict", "only measure the costs, and print what is expected (minutes)", {"action": "store_true"}),
    Option("--predicted", "what --predict --json has printed, to compare with", {"metavar": "FILE"}),
)
DECIDE = (
    Option(
        "--shape",
        "llama-3.1-8b, llama-3.2-1b, qwen2.5-0.5b, or layers x KV heads x head dim, as 80x8x128",
        {"required": True, "metavar": "NAME"},
    ),
    Option(
        "--prefill",
        "prompt tokens a second of one engine (default: computed for H100s, which is never enough for a yes)",
        {"type": _rate, "metavar": "TOK/S"},
    ),
    Option(
        "--wire", "GB/s from a server of the tier, see bench wire", {"type": _rate, "required": True, "metavar": "GB/S"}
    ),
    Option("--prices", "JSON with prices of your contracts: docs/traces.md", {"metavar": "FILE"}),
    Option("--gpus", "GPUs that serve this trace (default: as many as it needs)", {"type": _count, "metavar": "N"}),
    Option(
        "--tp",
        "GPUs of one engine (default 1)",
        {"type": _count, "default": 1, "metavar": "N", "dest": "gpus_per_engine"},
    ),
    Option(
        "--own",
        "hit rate that the engines have without the tier (default: computed from the memory of so many H100s)",
        {"type": _share, "metavar": "RATE"},
    ),
    Option(
        "--requests-per-month", "requests a month (default: the trace, over and over)", {"type": _count, "metavar": "N"}
    ),
    Option(
        "--capacities",
        "GiB of the tier (default 32,64, and so on to 4096)",
        {"type": _gibs, "default": [float(32 << i) for i in range(8)], "metavar": "GIB,GIB"},
    ),
    Option(
        "--precision",
        "of the KV that is stored: fp32, fp16, bf16 (default), int8 or int4",
        {"choices": ["fp32", "fp16", "bf16", "int8", "int4"], "default": "bf16", "metavar": "NAME"},
    ),
)
IMPORT = (
    Option(
        "file",
        'JSONL, on each line "prompt", "messages" or "tokens"; if known "answer" or "output_length", and "at_s" '
        '(seconds) or "timestamp" (milliseconds)',
        {"metavar": "PROMPTS"},
    ),
    Option("--out", "the trace", {"metavar": "FILE", "required": True}),
    Option("--tokenizer", "a folder in Hugging Face's format (default: the shipped model's)", {"metavar": "FOLDER"}),
    BLOCK,
    Option(
        "--salt-file",
        "a file of at least 16 random bytes, so that several files share ids (default: a new salt, which is not kept)",
        {"metavar": "FILE"},
    ),
    Option(
        "--form",
        "kvlab (default), mooncake or bailian",
        {"choices": ["kvlab", "mooncake", "bailian"], "default": "kvlab", "metavar": "NAME"},
    ),
)
EXPLAIN = (
    Option("file", "the prompt: text, or a JSON list of tokens", {"metavar": "FILE"}),
    Option("--url", "the same as --store", {"metavar": "URL", "dest": "store"}),
    Option("--model", "a model folder (default: the shipped model)", {"metavar": "FOLDER"}),
    Option("--against", "a prompt that should share its beginning with FILE", {"metavar": "FILE"}),
    Option(
        "--precision",
        "of the cache: fp32, fp16, bf16, int8, int4 (default fp16)",
        {"default": "fp16", "metavar": "NAME"},
    ),
    Option("--dtype", "in which the model computes (default float32)", {"default": "float32", "metavar": "NAME"}),
    Option("--block", "tokens in a block (default: that of the model)", {"type": _count, "metavar": "N"}),
    Option("--adapter", "the folder of a LoRA adapter", {"metavar": "FOLDER"}),
)

COMMANDS = (
    Command("demo", "run the whole system once: cold and warm requests to a real model", _demo, (STORE, IMPL, JSON)),
    Command("progress", "show which exercises of the course are solved in work/mykv.py", _progress, (IMPL,)),
    Command(
        "contracts",
        "ask the store and the cache in work/mykv.py every rule that kvlab's own keep",
        _contracts,
        (IMPL, JSON),
    ),
    Command(
        "doctor",
        "check this machine, or with --engine the set-up of a connector; exit with status 1 on a problem",
        _doctor,
        (ENGINE, STORE, ARGUMENTS),
    ),
    Command(
        "explain",
        "say block by block where the prompt in a file is, or why it misses; the salt is KVLAB_SALT in the environment",
        _explain,
        (*EXPLAIN, STORE, JSON),
    ),
    Command(
        "serve",
        "serve a small load with worker processes, a router and a shared store; print what came from where",
        _serve,
        (WORKERS, ROUTER, REQUESTS, RATE, STORE, *METRICS, JSON),
    ),
    Command(
        "replay",
        "hit rates of a trace, without time: policies, tiers, several nodes and their router",
        _replay,
        (FILE, BLOCK, IDS, *CACHES, CURVE, JSON),
    ),
    Command(
        "simulate",
        "time to first token of a trace on simulated nodes: queues, prefills, transfers",
        _simulate,
        (FILE, BLOCK, IDS, *CACHES, COSTS, INDEX, SPEED, BUCKET, JSON),
    ),
    Command(
        "strategies",
        "no cache, local pages, a router, Redis and all tiers on four workloads (a round takes 45 minutes)",
        _strategies,
        (*STRATEGIES, JSON),
    ),
    Command(
        "cost",
        "what a shared tier costs and saves, computed from dated prices: break-even, return on investment",
        _bench("kvlab.lab.cost_table"),
        (JSON,),
    ),
    Command(
        "decide",
        "does a shared tier pay for this trace: yes, no, or what to measure first, on one page",
        _decide,
        (FILE, *DECIDE, BLOCK, IDS, JSON),
    ),
    Command(
        "trace import",
        "make a trace of prompts: lengths, times and salted ids of blocks, no texts",
        _trace_import,
        IMPORT,
    ),
    Command(
        "bench gpu",
        "prefill, copies and time to first token on a GPU; without one, the same steps on the CPU",
        _bench("kvlab.lab.bench.gpu.command"),
        (JSON,),
    ),
    Command(
        "bench hash",
        "time of block keys in nanoseconds per token, compared with plain SHA-256",
        _bench("kvlab.lab.bench.hash"),
        (JSON,),
    ),
    Command(
        "bench codec",
        "size, speed and quality of every codec on real KV; --store adds transfer times (takes minutes)",
        _bench("kvlab.lab.bench.codec"),
        (WINDOWS, STORE, JSON),
    ),
    Command(
        "bench fuzz",
        "decode damaged and forged records; exit with status 1 if one is mishandled",
        _bench("kvlab.lab.fuzz"),
        (CASES, SEED, JSON),
    ),
    Command(
        "bench policies",
        "accesses per second of every eviction policy",
        _bench("kvlab.lab.bench.policies"),
        (TRACE, JSON),
    ),
    Command(
        "bench pins",
        "what pinned prefixes gain and all others pay, and TTLs beside LRU, on generated workloads and a trace",
        _bench("kvlab.lab.retention"),
        (TRACE, *RETENTION, JSON),
    ),
    Command(
        "bench routers",
        "eight routers on one trace: hits, balance, simulated waiting; exact and faulty indexes (takes minutes)",
        _bench("kvlab.lab.bench.routers"),
        (TRACE, JSON),
    ),
    Command(
        "bench pages",
        "time to first token and memory with KV in pages, compared with contiguous KV",
        _bench("kvlab.lab.bench.pages"),
        (JSON,),
    ),
    Command(
        "bench planner",
        "fetch or recompute: the planner on a virtual clock, against the best plan and against threshold rules",
        _bench("kvlab.lab.bench.planner"),
        (JSON,),
    ),
    Command(
        "bench ttft",
        "time to first token with a prefix from pages, host memory and a real Redis, compared with computing it",
        _bench("kvlab.lab.bench.ttft"),
        (STORE, JSON),
    ),
    Command(
        "bench serve",
        "continuous batching, saves and routers: tokens a second, latencies, hits and balance (takes minutes)",
        _bench("kvlab.lab.bench.serve"),
        (JSON,),
    ),
    Command(
        "bench simulate",
        "the simulator against the real scheduler: time to first token, predicted and measured (takes minutes)",
        _bench("kvlab.lab.bench.simulate"),
        (JSON,),
    ),
    Command(
        "bench engines",
        "vLLM with the connector: the same tokens, time to first token, faults (needs vLLM: make test-engines)",
        _bench("kvlab.lab.bench.engines"),
        (JSON,),
    ),
    Command(
        "bench wire",
        "GB/s to and from a local Redis or the one at --store (about 300 MB are written and deleted)",
        _bench("kvlab.lab.bench.wire"),
        (STORE, JSON),
    ),
    Command(
        "bench files",
        "the store in files beside reading and writing the same files by hand, and the price of each sync",
        _bench("kvlab.lab.bench.files"),
        (JSON,),
    ),
    Command(
        "bench stores",
        "the same values through Redis, files and every other store that is installed (takes minutes)",
        _bench("kvlab.lab.bench.stores"),
        (JSON,),
    ),
    Command(
        "bench shards",
        "compare a Redis Cluster of three nodes with one server on 256 records",
        _bench("kvlab.lab.bench.shards"),
        (JSON,),
    ),
    Command(
        "bench failover",
        "seconds until a replica replaces a failed master (takes minutes)",
        _bench("kvlab.lab.bench.failover"),
        (JSON,),
    ),
)
GROUPS = {
    "bench": "measure one part of the system on this machine",
    "trace": "make traces of requests, for replay and simulate",
}


# --- from the table to a parser -----------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    """A parser whose error messages hide the user name and the password of any URL."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"://\S*@", "://***@", message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvlab", description="A distributed KV cache for LLM serving.")
    parser.add_argument("--version", action="version", version=f"kvlab {kvlab.__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = inner.add_subparsers(required=True, metavar="COMMAND")
        one = groups[group].add_parser(name, help=command.help, description=command.help)
        one.set_defaults(run=command.run, parser=one)
        for option in command.options:
            one.add_argument(option.flag, help=option.help, **option.settings)
    return parser
