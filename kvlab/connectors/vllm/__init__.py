"""A KV connector for vLLM: blocks in a Redis that engines share, verified before use.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVLabConnector",
        "kv_connector_module_path": "kvlab.connectors.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": "redis://127.0.0.1:6379"}}'

    settings    what can be set
    namespace   what the keys depend on, and what is refused
    protocol    what scheduler and workers tell each other
    scheduler   look-ups; what is loaded, saved and compared
    worker      between the KV cache and the store
    stats       counters for vLLM's log and for Prometheus

vLLM makes two connectors, one in the process of its scheduler and one in each worker. A fault of the store is a
miss, never an error of a request.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.logger import init_logger

from kvlab.cache import describe
from kvlab.connectors.identity import files_digest
from kvlab.connectors.shadow import TOLERANCE, Shadow
from kvlab.connectors.vllm import namespace
from kvlab.connectors.vllm.protocol import Hello, Work
from kvlab.connectors.vllm.scheduler import SchedulerSide
from kvlab.connectors.vllm.settings import Settings
from kvlab.connectors.vllm.stats import Counters, PromMetrics
from kvlab.connectors.vllm.worker import WorkerSide
from kvlab.core import record
from kvlab.errors import ConfigError, KVLabError
from kvlab.model.files import Stamp
from kvlab.stores.base import MAX_VALUE_BYTES

__all__ = ["KVLabConnector"]

logger = init_logger("vllm.kvlab")

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class KVLabConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The connector that vLLM loads by name. Its methods are those of `KVConnectorBase_V1`.

    Raises:
        ConfigError: a setting is missing or invalid, or the set-up is one that this connector refuses.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        namespace.check_version(vllm.__version__)
        namespace.check_config(vllm_config)
        namespace.check_cache(kv_cache_config)
        self._settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._hello: Hello | None = None
        self._describer: describe.Describer | None = None
        if role == KVConnectorRole.SCHEDULER:
            block_tokens = vllm_config.cache_config.block_size
            store = self._settings.open_store()
            self._scheduler = SchedulerSide(store, block_tokens, self._shadow(), Adapters().digest)

    def _shadow(self, stored: str = "float32") -> Shadow:
        computed = str(self._vllm_config.model_config.dtype).removeprefix("torch.")
        coarser = max((_PRECISIONS[dtype] for dtype in (computed, stored)), key=TOLERANCE.__getitem__)
        return Shadow(self._settings.shadow, coarser)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a save that is dropped is a later miss."""
        return False

    # --- in the process of the scheduler ----------------------------------------------------------------------------
    @property
    def scheduler(self) -> SchedulerSide:
        """The scheduler's half."""
        assert self._scheduler is not None, "this is the connector of a worker"
        return self._scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Hello]) -> None:
        """Take the layouts of all workers, by pipeline and tensor rank."""
        hellos = [metadata[rank] for rank in sorted(metadata)]
        if any(hello.check != self._settings.check for hello in hellos):
            raise ConfigError(
                "expected the same KVLAB_SALT and KVLAB_KEYS in all processes of the engine, got different ones; "
                "executors that start workers elsewhere must be told to pass them on"
            )
        self._layouts, self._fingerprint = [hello.layout for hello in hellos], hellos[0].fingerprint
        self._enter(b"")
        layout = self._layouts[0]
        self._describer = describe.Describer(
            self._settings.open_store(),
            self._settings.directory_seal,
            self._settings.salt,
            describe.Description(
                layout.engine,
                self._vllm_config.model_config.model.rstrip("/").rpartition("/")[2],
                self._fingerprint.hex(),
                layout.dtype,
                layout.block_tokens,
                dtype=str(self._vllm_config.model_config.dtype).removeprefix("torch."),
                layout=namespace.layout_digest(self._layouts).hex(),
            ),
            self._settings.ttl_seconds,
        )
        logger.info(
            "blocks of %d tokens, %s, in %s; a prompt needs %d tokens to hit; namespace %s",
            layout.block_tokens, layout.backend, self.scheduler.store, layout.block_tokens + 1,
            self.scheduler.space.hex()[:16],
        )  # fmt: skip

    def _enter(self, epoch: bytes) -> None:
        space = namespace.namespace(self._layouts, self._fingerprint, self._settings.salt, epoch)
        self.scheduler.enter(space, len(self._layouts))

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Look a prompt up. None: ask again. True: the blocks are loaded while other requests run."""
        tokens = self.scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load of an admitted request."""
        self.scheduler.admitted(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Work:
        """Return the work of the workers for this step."""
        return self.scheduler.work(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take note of loads that ended."""
        self.scheduler.finished_loads(
            list(connector_output.finished_recving or ()), connector_output.kv_connector_worker_meta
        )

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Its blocks are free: what is saved was copied."""
        self.scheduler.forget(request)
        return False, None

    def reset_cache(self) -> bool:
        """Read nothing any more that was stored before, for example after new weights were put into the engine."""
        self._enter(os.urandom(16))
        logger.warning("the connector was reset: from now on this engine shares no blocks with any other")
        return True

    # --- in the process of a worker ---------------------------------------------------------------------------------
    @property
    def worker(self) -> WorkerSide:
        """The worker's half. There is none before the KV cache was registered."""
        assert self._worker is not None, "this is the connector of the scheduler, or no KV cache was registered"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the KV cache of the engine, and compute the identity of its blocks."""
        from vllm.distributed import get_pp_group, get_tp_group

        tensor_rank, size, stage = get_tp_group().rank_in_group, get_tp_group().world_size, get_pp_group().rank_in_group
        names = sorted(kv_caches)
        tensors = [namespace.blocks_of(kv_caches[name], self._kv_cache_config.num_blocks) for name in names]
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        layout = namespace.layout_of(self._vllm_config, spec, tensors, names[0])
        rank = stage * size + tensor_rank
        nbytes = record.max_record_bytes(self._settings.format, layout.shape, record.KIND_ENGINE)
        if nbytes > MAX_VALUE_BYTES:
            limit = MAX_VALUE_BYTES >> 20
            raise ConfigError(f"expected blocks of at most {limit} MiB, got {nbytes:,} bytes; lower --block-size")
        fingerprint = namespace.model_fingerprint(self._vllm_config) if rank == 0 else b""
        self._hello = Hello(layout, self._settings.check, fingerprint)
        store = self._settings.open_store()
        queue = self._settings.open_queue(self._settings.open_store())
        self._worker = WorkerSide(
            store, queue, self._settings.format, layout, tensors, rank, self._shadow(layout.dtype)
        )

    def get_handshake_metadata(self) -> Hello | None:
        """Return what the scheduler's half needs to know."""
        return self._hello

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the loads of this step in the background."""
        self.worker.start_loads(self._work)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs after its load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a block is saved with all its layers, after the step."""

    def wait_for_save(self) -> None:
        """Copy the blocks that this step filled."""
        self.worker.save(self._work)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copy what was fetched, and return the requests that can run."""
        return None, self.worker.finished(self._work.idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks whose load failed."""
        return self.worker.take_bad_ids()

    def build_connector_worker_meta(self) -> Any:
        """Return the failed blocks and the reasons, for the scheduler's half."""
        return self.worker.take_failures()

    @property
    def _work(self) -> Work:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        return work

    # --- both -------------------------------------------------------------------------------------------------------
    def get_kv_connector_stats(self) -> Counters | None:
        """Return what was counted since the last call."""
        if self._scheduler is not None:
            return self._scheduler.counters.take()
        return self.worker.take_counters()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Counters:
        """Return counters for the numbers that arrived from another process."""
        return Counters(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """Return the counters as Prometheus metrics."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Write what is queued, and close the stores."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
        if self._describer is not None:
            self._describer.close()


class Adapters:
    """The digests of LoRA adapters, by what their files were when an adapter was first used in this engine.

    If the files are gone or have changed since, what the engine has loaded is not known: None.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[int, str], tuple[object, bytes | None]] = {}

    def digest(self, request: Request) -> bytes | None:
        """Return the digest of the adapter of a request, b"" without one."""
        lora = request.lora_request
        if lora is None:
            return b""
        name = (lora.lora_int_id, lora.lora_path)
        stamps: object = None
        try:
            folder = namespace.model_folder(lora.lora_path)
            files = sorted(path for path in folder.iterdir() if path.is_file())
            stamps = [(path.name, *Stamp.of(path.stat())) for path in files]
            if name not in self._first:
                self._first[name] = (stamps, files_digest(folder))
        except (OSError, KVLabError) as error:
            logger.warning("nothing is cached for requests with the LoRA %s: %s", lora.lora_path, error)
        first, digest = self._first.setdefault(name, (stamps, None))
        return digest if stamps == first else None
