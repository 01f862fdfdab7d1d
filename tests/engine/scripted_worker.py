"""A worker without a model: it speaks the protocol of `kvlab.engine.worker`, starts at once, and misbehaves on demand.

    python scripted_worker.py        instead of `kvlab.engine.workers.COMMAND`

What it does is in `WorkerSettings.tiers`, which the group passes on. It imports nothing of kvlab or PyTorch.
"""

import json
import os
import sys
import time
from pathlib import Path

MODULUS = 251
POISON, IDLE_S = 666, 0.02


def next_token(known):
    """What follows: a function of all tokens so far, so that an answer shows where it went on."""
    return (sum(known) * 31 + len(known)) % MODULUS


def say(event, **content):
    line = json.dumps({"is": event, **content}) + "\n"
    os.write(1, line.encode())


def record(request, reason):
    return {"id": request["id"], "prompt_tokens": len(request["tokens"]), "tokens": [], "sources": {"computed": 1}} | {
        "reason": reason
    }


def read_lines(unread):
    """The lines that have come; None at the end of the input."""
    try:
        data = os.read(0, 1 << 16)
    except BlockingIOError:
        data = b""
    else:
        if not data:
            return None
    *lines, unread[0] = (unread[0] + data).split(b"\n")
    return [json.loads(line) for line in lines]


def first_line(unread):
    while b"\n" not in unread[0]:
        data = os.read(0, 1 << 16)
        if not data:
            sys.exit(0)
        unread[0] += data
    line, unread[0] = unread[0].split(b"\n", 1)
    return json.loads(line)


def is_first(path):
    """Whether no other process came here before."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def main():
    unread = [b""]
    first = first_line(unread)
    script = first["settings"]["tiers"]
    if "starts" in script:
        with Path(script["starts"]).open("a") as file:
            file.write(f"{os.getpid()}\n")
    if "fail" in script:
        say("failed", message=script["fail"])
        sys.exit(1)
    if "exit" in script or ("exit_first" in script and is_first(script["exit_first"])):
        sys.exit(7)
    if "exit_later" in script and not is_first(script["exit_later"]):
        sys.exit(7)
    if "slow_later" in script and not is_first(script["slow_later"]):
        time.sleep(2)
    os.write(1, script.get("junk", "").encode())
    other = "other_later" in script and not is_first(script["other_later"])
    eos = script.get("eos", -1)
    if "other_eos_later" in script and not is_first(script["other_eos_later"]):
        eos += 1
    say("ready", fingerprint=("11" if other else "00") * 32, block_tokens=4, eos=[eos])
    work(script, unread)


def work(script, unread):
    os.set_blocking(0, False)
    running = {}
    token_s, told = script.get("token_s", 0), 0.0
    while True:
        if script.get("deaf"):
            time.sleep(60)
        commands = read_lines(unread)
        if commands is None:
            time.sleep(script.get("end_s", 0))
            return
        for command in commands:
            obey(command, running, script)
        for request in list(running.values()):
            if "hold" in script and request["index"] >= script["hold"] and not Path(script["release"]).exists():
                continue
            step(request, running)
        if time.monotonic() - told > script.get("alive_s", 0.1):
            told = time.monotonic()
            say("alive", load=len(running))
        time.sleep(token_s if running else IDLE_S)


def obey(command, running, script):
    what = command.pop("do")
    if what == "submit":
        if POISON in command["tokens"]:
            os._exit(9)
        if script.get("refuse"):
            say("refused", id=command["id"], error=script["refuse"], message="because")
        elif script.get("nonsense"):
            say("outputs", outputs=[{"id": command["id"], "token": None, "record": None}])
        else:
            running[command["id"]] = command | {"index": 0, "known": list(command["tokens"])}
    elif what == "cancel" and not script.get("ignore_cancel"):
        request = running.pop(command["id"], None)
        if request is not None:
            say("outputs", outputs=[{"id": request["id"], "index": 0, "token": None, "record": record(request, "no")}])
    elif what == "stats" and not script.get("no_stats"):
        say("stats", number=command["number"], stats={"pid": os.getpid()})


def step(request, running):
    token = next_token(request["known"])
    request["known"].append(token)
    outputs = [{"id": request["id"], "index": request["index"], "token": token, "record": None}]
    request["index"] += 1
    if request["index"] == request["max_new_tokens"]:
        del running[request["id"]]
        end = {"id": request["id"], "index": request["index"], "token": None, "record": record(request, "length")}
        outputs.append(end)
    say("outputs", outputs=outputs)


if __name__ == "__main__":
    main()
