"""What blocks are identified by, what is refused, and the settings."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest
import torch

from kvlab.errors import ConfigError

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.connectors.vllm import KVLabConnector, namespace
from kvlab.connectors.vllm.namespace import blocks_of, layout_digest
from kvlab.connectors.vllm.protocol import Blocks, Hello, Work
from kvlab.connectors.vllm.settings import Settings
from kvlab.lab.engines import MODEL
from tests.engines.sides import LAYOUT, SPACE, hashes

pytestmark = pytest.mark.engines


URL = "redis://127.0.0.1:6379"


def test_a_worker_with_other_secrets_is_refused() -> None:
    urls = {"store": URL}
    same, other = Settings.of(urls, {"KVLAB_SALT": "a"}), Settings.of(urls, {"KVLAB_SALT": "b"})
    sealed = Settings.of(urls, {"KVLAB_SALT": "a", "KVLAB_KEYS": "1:" + "11" * 32})
    assert len({same.check, other.check, sealed.check}) == 3
    for hello in (Hello(LAYOUT, other.check), Hello(LAYOUT, sealed.check)):
        with pytest.raises(ConfigError, match="KVLAB_SALT and KVLAB_KEYS"):
            KVLabConnector.set_xfer_handshake_metadata_pp_aware(Fake(_settings=same), {(0, 0): hello})  # type: ignore[arg-type]


def test_the_namespace_is_in_no_dump() -> None:
    from vllm.logging_utils.dump_input import prepare_object_to_dump

    work = Work(SPACE, loads=[Blocks("a", b"", hashes(2), [1, 2])])
    for text in (repr(work), str(prepare_object_to_dump(work))):
        assert "sss" not in text and SPACE.hex() not in text


def test_kernels_may_divide_blocks() -> None:
    tensor = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(blocks_of(tensor, 6)[1], tensor[2:4]) and blocks_of(tensor, 12) is tensor
    blocks_of(tensor, 6)[1] = 7.0
    assert tensor[2:4].eq(7).all(), "it is a view"
    with pytest.raises(ConfigError, match="first axis"):
        blocks_of(tensor, 5)


def test_every_member_of_a_layout_is_in_the_namespace() -> None:
    spaces = {namespace.namespace([LAYOUT], b"f" * 32, b"")}
    for name, value in vars(LAYOUT).items():
        changed = copy.copy(LAYOUT)
        object.__setattr__(changed, name, value + 1 if isinstance(value, int) else value + value[:1])
        spaces.add(namespace.namespace([changed], b"f" * 32, b""))
    spaces |= {
        namespace.namespace([LAYOUT, LAYOUT], b"f" * 32, b""),
        namespace.namespace([LAYOUT], b"g" * 32, b""),
        namespace.namespace([LAYOUT], b"f" * 32, b"salt"),
        namespace.namespace([LAYOUT], b"f" * 32, b"", b"epoch"),
    }
    assert len(spaces) == 1 + len(vars(LAYOUT)) + 4 and len(layout_digest([LAYOUT])) == 32


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.3"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.32 or 0\.33"):
        namespace.check_version(version)
    for good in ("0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.33.0.dev5+g1234"):
        namespace.check_version(good)


def config(**changes: Any) -> Any:
    """A config that is accepted, with one member changed."""
    parts: dict[str, Any] = {
        "kv_transfer_config": Fake(kv_role="kv_both", kv_load_failure_policy="recompute"),
        "parallel_config": Fake(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "cache_config": Fake(prefix_caching_hash_algo="sha256", cache_dtype="auto"),
        "load_config": Fake(load_format="auto"),
        "model_config": Fake(
            is_hybrid=False, use_mla=False, get_sliding_window=lambda: None, is_encoder_decoder=False,
            hf_config=Fake(model_type="llama", to_dict=dict),
        ),
        "speculative_config": None,
    }  # fmt: skip
    for name, value in changes.items():
        part, _, member = name.partition("__")
        if member:
            setattr(parts[part], member, value)
        else:
            parts[part] = value
    return Fake(**parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_transfer_config__kv_role": "kv_producer"}, "kv_both"),
        ({"kv_transfer_config__kv_load_failure_policy": "fail"}, "recompute"),
        ({"speculative_config": object()}, "speculative"),
        ({"cache_config__prefix_caching_hash_algo": "xxhash"}, "sha256"),
        ({"cache_config__cache_dtype": "fp8"}, "kv-cache-dtype auto"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size 1"),
        ({"load_config__load_format": "dummy"}, "fingerprint"),
        (
            {
                "model_config__hf_config": Fake(
                    model_type="phi3", to_dict=lambda: {"rope_scaling": {"type": "longrope"}}
                )
            },
            "RoPE",
        ),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__get_sliding_window": lambda: 4096}, "sliding"),
    ],
)
def test_set_ups_that_are_refused(change: dict[str, Any], says: str) -> None:
    namespace.check_config(config())
    with pytest.raises(ConfigError, match=says):
        namespace.check_config(config(**change))


def test_everything_that_vllm_loads_is_in_the_fingerprint(tmp_path: Path) -> None:
    def of(folder: Path = MODEL, trust_remote_code: bool = False, **changes: Any) -> bytes:
        fields = json.loads((MODEL / "config.json").read_text("utf-8"))
        members = {
            "hf_config": Fake(to_dict=lambda: {**fields, **changes.pop("fields", {})}),
            "architectures": ["LlamaForCausalLM"],
            "model_impl": "auto",
            "quantization": None,
            "quantization_config": None,
            "dtype": torch.float32,
            **changes,
        }
        model = Fake(model=str(folder), revision=None, trust_remote_code=trust_remote_code, **members)
        return namespace.model_fingerprint(Fake(model_config=model, load_config=Fake(download_dir=None)))  # type: ignore[arg-type]

    copied = tmp_path / "copy"
    shutil.copytree(MODEL, copied)
    plain = of()
    assert of(copied) == plain, "the folder's name does not count"
    prints = [
        of(architectures=["GraniteForCausalLM"]),
        of(model_impl="transformers"),
        of(quantization="fp8"),
        of(quantization_config={"ignore": ["k_proj"]}),
        of(dtype=torch.bfloat16),
        of(fields={"rms_norm_eps": 1e-3}),
    ]
    (copied / "modeling.py").write_text("1")
    prints.append(of(copied, trust_remote_code=True))
    assert len({plain, *prints}) == len(prints) + 1
    shutil.copy(MODEL / "model.safetensors", copied / "z.safetensors")
    with pytest.raises(ConfigError, match=r"alone.*z\.safetensors"):
        of(copied)


def test_caches_that_are_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    full = FullAttentionSpec(**shape)
    namespace.check_cache(Fake(kv_cache_groups=[Fake(kv_cache_spec=full)]))
    for groups in (
        [],
        [full, full],
        [SlidingWindowSpec(**shape, sliding_window=128)],
        [FullAttentionSpec(**shape, sliding_window=128)],
        [FullAttentionSpec(**shape, non_causal=True)],
    ):
        with pytest.raises(ConfigError):
            namespace.check_cache(Fake(kv_cache_groups=[Fake(kv_cache_spec=spec) for spec in groups]))


def test_settings() -> None:
    settings = Settings.of({"store": URL, "shadow": 0.01}, {"KVLAB_SALT": "geheim", "KVLAB_KEYS": "1:" + "ab" * 32})
    assert settings.salt == b"geheim" and settings.keys == {1: b"\xab" * 32} and settings.shadow == 0.01
    assert "geheim" not in repr(settings) and "ab" * 8 not in repr(settings)
    assert Settings.of({}, {"KVLAB_STORE": URL}).store == URL
    assert Settings.of({"store": URL, "compress": True}, {}).format.codec == "zstd"


@pytest.mark.parametrize(
    ("extra", "environment", "says"),
    [
        ({}, {}, "KVLAB_STORE"),
        ({"store": "fakeredis://"}, {}, "scheduler and workers share"),
        ({"store": "memory://"}, {}, "scheduler and workers share"),
        ({"store": 5}, {}, "URL"),
        ({"store": "http://x"}, {}, "scheme|expected"),
        ({"store": URL, "ttl": 5}, {}, "got ttl"),
        ({"store": URL, "salt": "x"}, {}, "KVLAB_SALT"),
        ({"store": URL, "ttl_seconds": -1}, {}, "TTL"),
        ({"store": URL, "shadow": 2}, {}, "shadow"),
        ({"store": URL, "shadow": "all"}, {}, "shadow"),
        ({"store": URL, "compress": "gzip"}, {}, "compress"),
        ({"store": URL, "queue_bytes": 0}, {}, "queue_bytes"),
        ({"store": URL, "deadline_s": 0}, {}, "deadline_s"),
        ({"store": URL}, {"KVLAB_KEYS": "1:zz"}, "hexadecimal"),
        ({"store": URL}, {"KVLAB_KEYS": "1:ab"}, "32"),
    ],
)
def test_settings_that_are_refused(extra: dict[str, Any], environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings.of(extra, environment)
