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
    """From each worker, once: the layout of its blocks; the first worker adds the fingerprint of the model."""

    layout: Layout
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
        idle: no request runs in this step, so that the engine would only ask again and again whether loads ended.
    """

    space: bytes
    loads: list[Blocks] = field(default_factory=list)
    saves: list[Blocks] = field(default_factory=list)
    checks: list[Blocks] = field(default_factory=list)
    idle: bool = False


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
