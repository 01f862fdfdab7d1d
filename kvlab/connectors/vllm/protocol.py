"""What scheduler and workers of one engine tell each other. vLLM carries these objects between its own processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvlab.connectors.vllm.namespace import Layout


@dataclass
class Hello(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """From each worker, once.

    Attributes:
        layout: of its blocks.
        check: a digest of its salt and master keys; every process has them from its own environment.
        fingerprint: of the model, from the first worker.
    """

    layout: Layout
    check: bytes = b""
    fingerprint: bytes = b""


@dataclass(frozen=True)
class Blocks:
    """Some blocks of one request.

    Attributes:
        adapter: the digest of its LoRA adapter, or b"".
        hashes: vLLM's block hashes.
        ids: where the blocks are in the KV cache.
    """

    request: str
    adapter: bytes
    hashes: list[bytes]
    ids: list[int]


@dataclass
class Work(KVConnectorMetadata):  # type: ignore[misc]
    """To all workers, for one step: what to load, to save, and to compare with the store.

    Attributes:
        space: what all keys are derived from. With it and known tokens, the keys of a tenant can be computed, so it
            is in no dump.
        idle: no request runs in this step, so that the engine would only ask again and again whether loads ended.
    """

    space: bytes = field(repr=False)
    loads: list[Blocks] = field(default_factory=list)
    saves: list[Blocks] = field(default_factory=list)
    checks: list[Blocks] = field(default_factory=list)
    idle: bool = False

    def anon_repr(self) -> str:
        """What vLLM writes into the log when its engine fails."""
        return f"Work({len(self.loads)} loads, {len(self.saves)} saves, {len(self.checks)} checks)"


@dataclass
class Failures(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers, for one step: the blocks that could not be loaded.

    Attributes:
        blocks: by request, the hash of each block and the reason.
    """

    blocks: dict[str, dict[bytes, str]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Failures:
        """Join the failures of two workers."""
        for request, reasons in other.blocks.items():
            self.blocks.setdefault(request, {}).update(reasons)
        return self
