"""Beyond one machine: the scheduler as a Ray Serve deployment, and kvlab's router as its request router.

    with private_ray():
        workers = deploy(WorkerSettings(store="redis://127.0.0.1:6379"), replicas=2)
        stream = Stream(workers, prompt, max_new_tokens=64)
        async for token in stream:
            ...

    private      a Ray of this machine alone: on loopback, with a token, gone afterwards
    thread       a scheduler in a thread of its own
    replica      what one Ray Serve replica runs
    deployment   the Ray Serve application
    router       which replica gets a request
    stream       an answer that outlives its replica

On a cluster that runs already, `serve.run(application(…))` takes the place of `private_ray` and `deploy`. There is no
HTTP server in here: the HTTP face of kvlab is vLLM's server with the connector (`kvlab.connectors.vllm`).

Ray is the extra kvlab[ray]. It is imported when it is needed, and never before `private_ray` has set what it reads.
"""

from kvlab.engine.worker import WorkerSettings
from kvlab.serve.deployment import application, deploy
from kvlab.serve.private import private_ray
from kvlab.serve.stream import Stream

__all__ = ["Stream", "WorkerSettings", "application", "deploy", "private_ray"]
