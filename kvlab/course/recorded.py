"""Results that not every machine can produce: measured on this machine if possible, else read from a recording.

Recordings are JSON files in the folder `recorded`. Each file names the machine of the measurement.
A notebook that runs with `KVLAB_RECORD=1` updates its recordings. `python -m kvlab.course.recorded NAME …`
updates recordings that no notebook makes: what takes minutes, and copies of results that are in docs/results or in the
outputs of notebooks, for readers who have only the package.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError
from kvlab.lab.machine import describe_machine
from kvlab.lab.streams import accept_any_text

RECORDED = Path(__file__).parent / "recorded"
ROOT = Path(__file__).resolve().parents[2]
DIGITS = 5
"""Of the numbers in copied results."""
Result = dict[str, Any]


def live_or_recorded(name: str, run: Callable[[], Result], needs: str = "redis-server", called: str = "") -> Result:
    """The result of `run()` if the program `needs` is installed, else the recording called `name`.

    Prints one line with the source of the result. Both sources give the same structure.

    Args:
        called: what the line calls the program, if not `needs`. Its recording is made elsewhere.

    Raises:
        ConfigError: the program is missing and there is no such recording.
    """
    accept_any_text()  # a machine's name may contain special characters
    if shutil.which(needs):
        result = run()
        if os.environ.get("KVLAB_RECORD") and not called:
            save_recording(name, result)
        print("source: measured on this machine")
        return result
    result, machine = load_recording(name)
    print(f"source: recorded on {machine} ({called or needs} is not installed here)")
    return result


def save_recording(name: str, result: Result, machine: str = "") -> None:
    """Write a recording with the description of its machine, by default of this one."""
    RECORDED.mkdir(exist_ok=True)
    content = {"machine": machine or describe_machine(), "result": result}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (RECORDED / f"{name}.json").write_text(text, "utf-8")


def load_recording(name: str) -> tuple[Result, str]:
    """A recording's result and the description of its machine.

    Raises:
        ConfigError: there is no such recording.
    """
    try:
        content = json.loads((RECORDED / f"{name}.json").read_text("utf-8"))
    except FileNotFoundError:
        have = ", ".join(sorted(p.stem for p in RECORDED.glob("*.json"))) or "none"
        raise ConfigError(f"no recording called {name!r} (there are: {have})") from None
    return content["result"], content["machine"]


def _node_timeouts() -> Result:
    from kvlab.lab.bench import failover

    return {"seconds": failover.run()["killed"]}


def _hung_defaults() -> Result:
    """How long one GET takes with redis-py's defaults and with `RedisStore`, by what the server does."""
    import redis

    from kvlab.stores import RedisStore
    from kvlab.testbed.server import RedisServer

    calls = {}
    with RedisServer() as server:
        clients: dict[str, Callable[[], Any]] = {
            "Redis(host, port)": server.client,
            "Redis.from_url(url)": lambda: redis.Redis.from_url(server.url),
            "RedisStore(url)": lambda: RedisStore(server.url),
        }
        for kind, opened in clients.items():
            with opened() as client, server.client() as writer:
                writer.set("kv:key", "value")
                calls[f"answers, {kind}"] = _one_get(client)
                with server.paused():
                    calls[f"hangs, {kind}"] = _one_get(client)
                server.kill()
                calls[f"is gone, {kind}"] = _one_get(client)
                server.start()
    return {"client": f"redis-py {redis.__version__}, default settings, warm connection", "calls": calls}


def _one_get(client: Any) -> Result:
    """Seconds of one GET of kv:key, and what it ended in: the value, "miss", or the name of an error."""
    begin = time.perf_counter()
    try:
        got = client.get_many([b"key"])[0] if hasattr(client, "get_many") else client.get("kv:key")
        ends_in = "miss" if got is None else got.decode()
    except Exception as error:
        ends_in = type(error).__name__
    return {"seconds": round(time.perf_counter() - begin, 2), "ends_in": ends_in}


def _ray_serve() -> Result:
    """Ray Serve starts processes and reads its settings once, so it runs in a child process."""
    python = ROOT / ".venv-ray" / "bin" / "python"
    done = subprocess.run([str(python), "-m", "kvlab.lab.ray_serve"], check=True, capture_output=True, text=True)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


# --- copies -------------------------------------------------------------------------------------
def strategies() -> Result:
    """What notebook 10 shows of docs/results/strategies.json, with its machine."""
    return _copied("strategies", "rows", "order", "predicted", "computed", "loads")


def stores() -> Result:
    """What notebook 11b shows of docs/results/bench_stores.json, with its machine."""
    return _copied("bench_stores", "rows", "io_threads", "kept_memory", "cannot")


def peers() -> Result:
    """What notebook 11b shows of docs/results/peer_files.json, with its machine."""
    return _copied("peer_files", "rows")


def answers() -> Result:
    """What came out for the questions of `guesses`, by the stored outputs of notebooks 00 to 09."""
    found: Result = {"machine": "the machines of the stored outputs, 2 cores each"}
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
            names = re.findall(r'\bcame_out\(\s*"(\w+)"', "".join(cell["source"]))
            printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            values = re.findall(r"^measured: (\S+) .*\(you ", printed, re.MULTILINE)
            found |= dict(zip(names, map(float, values), strict=True))
    return found


def trace(file: str | Path | None = None) -> Result:
    """Replays of Mooncake's conversation trace, which does not ship.

    Args:
        file: where it is; by default what the environment variable TRACE says.
    """
    from kvlab.lab.replay import lru_curve, replay
    from kvlab.lab.traces import Trace

    requests = Trace(file or os.environ["TRACE"])
    hits, curve = replay(requests, requests.block_tokens).hits, lru_curve(requests)
    found = {f"{blocks:,}": curve[min(blocks, len(curve) - 1)] for blocks in (1_000, 10_000, 30_000, 50_000, 100_000)}
    return {
        "trace": "Mooncake, conversation_trace.jsonl (FAST 2025)",
        "block_tokens": requests.block_tokens,
        "requests": hits.requests,
        "blocks": hits.blocks,
        "mean_tokens": round(hits.tokens / hits.requests),
        "rates": _short(hits.rates()),
        "lru": _short({name: count / hits.blocks for name, count in {**found, "endless": curve[-1]}.items()}),
    }


def _copied(file: str, *shown: str) -> Result:
    content = json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text("utf-8"))
    copied: Result = _short({name: content[name] for name in (*shown, "machine")})
    return copied


def _short(value: Any) -> Any:
    """The same with fewer digits."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


SLOW = {
    "05_hung_defaults": _hung_defaults,
    "07_node_timeout": _node_timeouts,
    "08_ray": _ray_serve,
    "10_trace": trace,
    "10_strategies": strategies,
    "10_answers": answers,
    "11b_stores": stores,
    "11b_peers": peers,
}
"""The functions that make the recordings that no notebook makes. A result may name its machine itself."""

if __name__ == "__main__":
    for slow in sys.argv[1:] or [name for name in SLOW if name != "10_trace" or "TRACE" in os.environ]:
        made = SLOW[slow]()
        save_recording(slow, made, made.pop("machine", ""))
