"""Replicas in processes of their own, on a real Ray that is started once, over a real Redis with a password.

What they measure is listed at the end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

import kvlab
from kvlab.engine.requests import Busy
from kvlab.engine.workers import WorkerError
from kvlab.errors import InputError, KVLabError
from kvlab.serve import Stream, WorkerSettings, application, deploy, deployment, private_ray
from kvlab.testbed.server import RedisServer
from tests.serve.kit import NEW, SECRETS, FragileReplica, prompts

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PASSWORD, SALT = SECRETS
RECOVERY_S = 90.0


class System:
    """Redis, Ray, and two replicas over one store."""

    def __init__(self, stack, folder):
        self.stack = stack
        self.redis = stack.enter_context(RedisServer("--requirepass", PASSWORD))
        self.store = self.redis.url.replace("redis://", f"redis://:{PASSWORD}@")
        self.before = {p.pid for p in psutil.Process().children(recursive=True)}
        begin = time.perf_counter()
        stack.enter_context(private_ray(folder=str(folder)))
        self.ray_s = time.perf_counter() - begin
        self.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deployment, "Replica", FragileReplica)
            app = application(self.settings(), replicas=2, cpus=0.1)
        begin = time.perf_counter()
        self.handle = deploy(app)
        self.deploy_s = time.perf_counter() - begin

    def settings(self, **changes):
        return WorkerSettings(store=self.store, salt=SALT, **changes)

    def processes(self):
        return [p for p in psutil.Process().children(recursive=True) if p.pid not in self.before]

    def replicas(self, app="kvlab"):
        return {p.pid: p for p in self.processes() if p.name().startswith(f"ray::ServeReplica:{app}")}

    async def requests(self):
        """How many requests each of the two replicas has."""
        seen = {}
        while len(seen) < 2:
            status = await asyncio.wait_for(self.handle.status.remote(), 5)
            seen[status["pid"]] = status["requests"]
        return seen

    async def wait_for_replicas(self, gone):
        """Wait until two replicas answer, `gone` not among them; return the seconds."""
        begin = time.perf_counter()
        seen = set()
        while len(seen) < 2:
            assert time.perf_counter() - begin < RECOVERY_S
            try:
                status = await asyncio.wait_for(self.handle.status.remote(), 5)
                seen |= {status["pid"]} - {gone}
            except Exception:
                pass
            await asyncio.sleep(0.05)
        return time.perf_counter() - begin


@pytest.fixture(scope="module")
def system():
    if shutil.which("redis-server") is None:
        pytest.skip("needs a redis-server program: apt-get install redis-server")
    folder = tempfile.TemporaryDirectory(prefix="kvlab-t-")
    with folder, ExitStack() as stack:
        yield System(stack, Path(folder.name))


@pytest.fixture(scope="module")
def wanted(model):
    return [kvlab.generate(model, prompt, NEW).tokens for prompt in prompts(6)]


async def whole(stream):
    return [token async for token in stream]


def test_start_to_ready_in_seconds(measured, system):
    own = [p.memory_full_info().pss >> 20 for p in system.replicas().values()]
    memory = sum(p.memory_full_info().pss for p in system.processes()) >> 20
    measured(f"start: Ray {system.ray_s:.1f} s, two replicas {system.deploy_s:.1f} s")
    measured(f"memory: {len(system.processes())} processes, {memory} MiB, of these the replicas {own}")


def test_tokens_are_those_of_generate_and_the_blocks_are_shared(system, wanted):
    async def go():
        streams = [Stream(system.handle, prompt, NEW) for prompt in prompts(6)]
        got = await asyncio.gather(*map(whole, streams))
        return got, [stream.record for stream in streams]

    got, records = asyncio.run(go())
    assert got == wanted
    assert {record["pid"] for record in records} == set(system.replicas()), "both replicas served"
    assert all(record["sources"] == {"computed": 300} for record in records)
    again = asyncio.run(go())[1]
    assert all(record["sources"].get("computed") == 44 for record in again)


def test_a_router_that_raises_serves_in_turn_from_the_shared_blocks(system, wanted):
    """In turn means that each prompt comes to a replica that has computed none: all blocks are those of the others."""
    app = application(system.settings(), replicas=2, cpus=0.1, router_class="tests.serve.routers.RaisingRouter")
    handle = deploy(app, "raising")

    async def go():
        streams = [Stream(handle, prompt, 8, wait_s=30) for prompt in prompts(6)]
        return await asyncio.gather(*map(whole, streams)), [stream.record for stream in streams]

    got, records = asyncio.run(go())
    assert got == [tokens[:8] for tokens in wanted]
    assert {record["pid"] for record in records} == set(system.replicas("raising"))
    assert all(record["sources"] == {"store": 256, "computed": 44} for record in records)


def test_tokens_come_one_by_one(measured, system):
    async def go():
        times = []
        async for _ in Stream(system.handle, prompts(1)[0], 60):
            times.append(time.perf_counter())
        return times

    times = asyncio.run(go())
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    assert sum(gap > 1e-4 for gap in gaps) > 20, "not all at once at the end"
    measured(f"one stream: median gap between tokens {gaps[len(gaps) // 2] * 1e3:.1f} ms")


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 4, "at least one token"),
        ("text", 4, "sequence of tokens"),
        ([10**9], 4, "check the tokenizer"),
        ([1], 0, "max_new_tokens"),
        ([1], None, "max_new_tokens"),
        ([1], 10**6, "context"),
    ],
)
def test_bad_input_is_kvlabs_own_error(system, prompt, new, message):
    with pytest.raises(InputError, match=message) as caught:
        asyncio.run(whole(Stream(system.handle, prompt, new)))
    assert type(caught.value) is InputError


def test_replicas_that_cannot_be_made_are_an_error(system):
    with pytest.raises(KVLabError, match=r"the replicas could not be started: .*no-such-folder"):
        deploy(application(WorkerSettings(model="/no-such-folder"), replicas=1, cpus=0.1), "broken")


def test_back_pressure_and_cancellation(measured, system):
    """One replica with one request at a time and one that waits; one more waits in this process."""
    settings = system.settings(max_batch=1, pages=80)
    app = application(settings, replicas=1, cpus=0.1, max_waiting=1, max_queued=1)
    handle = deploy(app, "narrow")

    async def go():
        tasks = []
        for prompt in prompts(6):
            tasks.append(asyncio.create_task(whole(Stream(handle, prompt, 700))))
            await asyncio.sleep(0.3)
        refused = [task for task in tasks if task.done()]
        assert all(isinstance(task.exception(), Busy) for task in refused) and 1 <= len(refused) <= 4
        for task in tasks:
            task.cancel()
        begin = time.perf_counter()
        await asyncio.gather(*tasks, return_exceptions=True)
        while True:
            status = await asyncio.wait_for(handle.status.remote(), 30)
            if status["requests"] == 0 and status["available_pages"] == status["pages"]:
                break
            assert time.perf_counter() - begin < 30
        measured(
            f"{len(refused)} of 6 refused; all pages back {time.perf_counter() - begin:.2f} s after the cancellation"
        )
        async for _ in Stream(handle, prompts(1)[0], 700):
            break
        while (await handle.status.remote())["requests"]:
            assert time.perf_counter() - begin < 30
        return await whole(Stream(handle, prompts(1)[0], 4))

    assert len(asyncio.run(go())) == 4


def test_a_scheduler_that_fails_ends_its_streams_elsewhere_and_is_replaced(measured, system, wanted):
    async def go():
        streams = [Stream(system.handle, prompt, NEW) for prompt in prompts(4)]
        tasks = [asyncio.create_task(whole(stream)) for stream in streams]
        while sum(len(stream.tokens) for stream in streams) < 20:
            await asyncio.sleep(0.01)
        broken = 0
        while not broken:
            broken = await system.handle.break_scheduler.remote()
        got = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        return got, sum(stream.lost for stream in streams), await system.wait_for_replicas(broken)

    got, lost, seconds = asyncio.run(go())
    assert got == wanted[:4] and lost >= 1
    measured(f"{lost} tries were lost; two replicas again after {seconds:.1f} s")


@pytest.mark.parametrize("seed", range(5))
def test_streams_survive_kill_9_of_a_replica(measured, system, wanted, seed):
    rng = random.Random(seed)
    moment = rng.randrange(1, 6 * NEW * 2 // 3)

    async def go():
        streams = [Stream(system.handle, prompt, NEW) for prompt in prompts(6)]
        tasks = [asyncio.create_task(whole(stream)) for stream in streams]
        while sum(len(stream.tokens) for stream in streams) < moment:
            await asyncio.sleep(0.002)
        victim = rng.choice(sorted(pid for pid, requests in (await system.requests()).items() if requests))
        system.replicas()[victim].kill()
        begin = time.perf_counter()
        got = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        ended = time.perf_counter() - begin
        return got, [stream.lost for stream in streams], ended, await system.wait_for_replicas(victim) + ended

    got, lost, ended, seconds = asyncio.run(go())
    assert got == wanted
    assert sum(lost) >= 1, "no stream was on the replica that died"
    measured(
        f"kill -9 at token {moment} of {6 * NEW}: {sum(lost)} of 6 streams went on elsewhere, all ended {ended:.1f} s "
        f"later, two replicas again after {seconds:.1f} s"
    )


def test_all_replicas_gone_is_an_error_and_no_hang(system):
    """Ray replaces them, but not within the wait."""

    async def go():
        for process in system.replicas("raising").values():
            process.kill()
        from ray import serve

        with pytest.raises(WorkerError):
            await asyncio.wait_for(whole(Stream(serve.get_app_handle("raising"), prompts(1)[0], 8, wait_s=0.3)), 60)

    asyncio.run(go())


# --- who can come in, and what can be read ----------------------------------------------------------------------------
def listening(processes):
    """(process, address) of all listening sockets of the processes."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [(process, c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return found


def own_address():
    """An address of this machine that is not loopback, if it has one."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return "127.0.0.1"


def status_of(channel):
    from ray.serve._private.common import RequestMetadata
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    metadata = RequestMetadata("test", "test", call_method="status")
    call = ASGIRequest(
        pickled_request_metadata=pickle.dumps(metadata), request_args=pickle.dumps(()), request_kwargs=pickle.dumps({})
    )
    return pickle.loads(ASGIServiceStub(channel).HandleRequest(call, timeout=30).serialized_message)


def test_every_port_is_on_loopback_but_one_a_replica_and_that_refuses_strangers(measured, system):
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    ports = listening([psutil.Process(), *system.processes()])
    outside = [(process, at) for process, at in ports if at.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    everyone = {pid for app in ("kvlab", "narrow", "raising") for pid in system.replicas(app)}
    assert len(ports) > len(outside) and {process.pid for process, _ in outside} <= everyone
    assert set(system.replicas()) <= {process.pid for process, _ in outside}
    address = own_address()
    for process, at in outside:
        for metadata in ((), (("authorization", "Bearer " + "0" * 64),)):
            with grpc.insecure_channel(f"{address}:{at.port}") as channel:
                stranger = grpc.intercept_channel(channel, _Says(metadata))
                with pytest.raises(grpc.RpcError) as refused:
                    status_of(stranger)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert status_of(init_grpc_channel(f"{address}:{at.port}"))["pid"] == process.pid, "the token opens it"
    measured(
        f"ports: {len(ports)}, of these {len(outside)} on all interfaces, which refuse strangers (UNAUTHENTICATED)"
    )


def test_no_secret_in_a_command_line_or_a_file(system):
    secrets = [*SECRETS, os.environ["RAY_AUTH_TOKEN"]]
    lines = [" ".join(process.cmdline()) for process in [psutil.Process(), *system.processes()]]
    files = [path for path in system.folder.rglob("*") if path.is_file()]
    assert len(lines) > 5 and len(files) > 10
    for secret in secrets:
        assert not [line for line in lines if secret in line]
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_nothing_remains(measured, system):
    folder, processes = system.folder, system.processes()
    begin = time.perf_counter()
    system.stack.close()
    measured(f"ended in {time.perf_counter() - begin:.1f} s")
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert not list(folder.iterdir())
    assert "ray" in sys.modules and not listening([psutil.Process()])


def test_what_the_course_has_recorded_can_be_made_again():
    """In a process of its own, with the whole environment as a user has it."""
    done = subprocess.run([sys.executable, "-m", "kvlab.lab.ray_serve"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_tokens"] == [True, True] and result["lost"] >= 1
    assert result["sources"][0] == {"computed": 960} and result["sources"][1].get("store", 0) > 0


class _Says:
    """Adds metadata to a call; made when it is needed, because its bases come with Ray."""

    def __new__(cls, metadata):
        import grpc

        class Says(grpc.UnaryUnaryClientInterceptor):
            def intercept_unary_unary(self, go_on, details, request):
                return go_on(details._replace(metadata=metadata), request)

        return Says()
