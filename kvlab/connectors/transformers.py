"""A KV store in front of a causal language model of Hugging Face transformers.

    input_ids -> blocks in the store -> DynamicCache -> model.generate computes the rest -> new blocks back

`CachedModel.generate` takes what `model.generate` takes and returns what it returns. Greedy tokens are the same
with any contents of the store, if model and store use fp32.

A block key covers the tokens, and the fingerprint the weights, the config and the adapters. Models whose KV depends
on more are refused at construction (`kvlab.connectors.hf_models`), inputs and forward hooks at each call. What
nothing shows is a number that was changed on a module by hand, such as `self_attn.scaling`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from kvlab.cache import CacheStats, DistributedKVCache
from kvlab.cache.distributed import DAY_S, describe_every
from kvlab.cache.explain import Explanation
from kvlab.connectors.shadow import TOLERANCE, Shadow
from kvlab.core.keys import KVSpec
from kvlab.errors import ConfigError, InputError
from kvlab.model.digests import TOKENIZER, tokenizer_digest
from kvlab.stores import Health, Store, open_store
from kvlab.stores.base import described
from kvlab.stores.faults import Reason

try:
    from transformers import DynamicCache, GenerationConfig
except ImportError as error:
    raise ImportError(f'kvlab.connectors.transformers needs transformers ({error}): pip install "kvlab[hf]"') from error

from kvlab.connectors import hf_models  # imports transformers

PRECISION_OF: Final = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHORT: Final = "short"
# What `generate` takes besides the fields of a GenerationConfig, and what does not change keys and values.
CALL_SETTINGS: Final = frozenset(
    (
        "attention_mask",
        "generation_config",
        "logits_processor",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "synced_gpus",
        "tokenizer",
    )
)
GENERATION_FIELDS: Final = frozenset(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
# Settings under which a row of the KV would not be the KV of a row of the result, and their allowed values.
ONE_ROW_EACH: Final[dict[str, tuple[object, ...]]] = {
    "assistant_early_exit": (None,),
    "cache_implementation": (None,),
    "num_beams": (None, 1),
    "output_attentions": (None, False),  # their shape would tell how much was cached
    "output_hidden_states": (None, False),
    "num_return_sequences": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "token_healing": (None, False),
    "use_mtp": (None, False),
}


@dataclass(frozen=True)
class Request:
    """What the cache did for one call of `generate`.

    Attributes:
        prompt_tokens: the length T of each row.
        cached_tokens: how many of them were loaded instead of computed. At least one is computed.
        saved_blocks: the new blocks of all rows that are now stored.
        shadow: whether a hit was computed to compare it with the store, so that `cached_tokens` is 0.
        reason: why not more blocks of the prompt were cached. "" if all were, or in shadow mode; "short" if the
            prompt has no full block; else a `kvlab.stores.faults.Reason`, such as "absent" or "timeout".
    """

    prompt_tokens: int
    cached_tokens: int
    saved_blocks: int
    shadow: bool
    reason: str


class CachedModel:
    """A Hugging Face causal LM whose prompts are looked up in a KV store before they are computed.

    Blocks are shared with every process that runs the same model with the same precision, salt and block size. For a
    plain Llama this includes `kvlab.generate`. One call at a time.

    Weights are hashed at construction. Every call checks whether they, the adapters, the config or the device changed:
    address, version, dtype, shape and 16 numbers of each tensor. If so, they are hashed again. Call `refresh` after
    writes through `.data` to single numbers, which this check may miss.

    Args:
        model: in evaluation mode. It may be a PEFT model.
        store: a URL (see `kvlab.stores.open_store`) or a `Store`. `close` closes it.
        precision: fp32, fp16, bf16, int8 or int4; by default that of the model's KV, which loses nothing.
        compress, salt, encryption_keys, encryption_key_id, block_tokens: see `DistributedKVCache`.
        ttl_seconds: the lifetime after the last write or read. A `Store` object has its own.
        tokenizer: a folder with tokenizer.json, whose digest becomes part of the fingerprint.
        shadow: the share of hits, 0 to 1, that are computed and compared with the store. See `kvlab.connectors.shadow`.

    Attributes:
        last: the `Request` of the last call.
        shadow: the `Shadow`, which counts compared and differing blocks.

    Raises:
        ConfigError: the model's KV is not plain keys and values that depend on the earlier tokens only (sliding
            windows, MLA, linear attention, encoders, length-dependent RoPE …), or a setting is invalid.
    """

    def __init__(
        self,
        model: Any,
        store: str | Store = "fakeredis://",
        *,
        precision: str | None = None,
        compress: bool | str = False,
        ttl_seconds: float | None = DAY_S,
        salt: str | bytes = b"",
        encryption_keys: Mapping[int, bytes] | None = None,
        encryption_key_id: int | None = None,
        block_tokens: int | None = None,
        tokenizer: str | Path | None = None,
        shadow: float = 0.0,
    ) -> None:
        self.model = model
        self.shadow = Shadow(shadow, "fp32")  # `refresh` sets the precision
        self.last = Request(0, 0, 0, False, "")
        self._precision, self._tokenizer = precision, _tokenizer_of(tokenizer)
        self._options: dict[str, Any] = {
            "compress": compress,
            "salt": salt,
            "encryption_keys": encryption_keys,
            "encryption_key_id": encryption_key_id,
            "block_tokens": block_tokens,
        }
        self._describe_every_s = describe_every(store, ttl_seconds)
        self._earlier = CacheStats()
        self._cache: DistributedKVCache | None = None
        fit = hf_models.fit(model)
        self.store = _store_of(store, ttl_seconds)
        self._bind(fit)

    def __repr__(self) -> str:
        return f"CachedModel({type(self.model).__name__}, {self.store!r})"

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **settings: Any) -> Any:
        """Return what `model.generate(input_ids, attention_mask=ones, **settings)` returns.

        Args:
            input_ids: [N, T], rows of the same length without padding.
            settings: of `generate`. Settings in generation configs count too, except `use_cache`.

        Raises:
            InputError: the prompt is empty or padded; the model is in training mode or under autocast; or a setting
                asks for several beams, for assisted decoding, for another cache, or gives the model an input that
                the block keys do not cover.
            ConfigError: the model was changed to one that the constructor refuses.
        """
        self._check(input_ids, settings)
        cache = self._current()
        rows, T = input_ids.tolist(), input_ids.shape[1]
        before = self._misses(cache)
        found = min(cache.match(row) for row in rows)
        shadow = found > 0 and self.shadow.chooses()
        past = DynamicCache(config=self.model.config)
        got = found if shadow else self._load(cache, rows, found, past, T - 1)
        full = T // cache.block_tokens * cache.block_tokens
        reason = "" if shadow else _reason(full, got, self._misses(cache) - before)
        output = self._run(input_ids, past, settings)
        rows = (output if isinstance(output, Tensor) else output.sequences).tolist()
        if shadow:
            self._compare(cache, [row[:found] for row in rows], past)
        if hf_models.stamp(self.model) != self._stamp:  # it changed while it generated
            rows = []
        saved = sum(self._save(cache, row[: self._end(row, T, settings)], past, n, got) for n, row in enumerate(rows))
        self.last = Request(T, 0 if shadow else min(got, T - 1), saved, shadow, reason)
        return output

    @property
    def cache(self) -> DistributedKVCache:
        """The cache of the fingerprint that the model had at the last call."""
        assert self._cache is not None, "`__init__` sets it"
        return self._cache

    def refresh(self) -> None:
        """Hash the weights again. `generate` does so by itself when it notices a change (see the class)."""
        self._bind(hf_models.fit(self.model))

    def explain(
        self,
        input_ids: Tensor,
        against: Sequence[int] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> Explanation:
        """Explain block by block where a prompt is, or why it is not there. See `DistributedKVCache.explain`.

        Args:
            input_ids: [1, T], as for `generate`.

        Raises:
            InputError: the prompt is empty or has several rows.
        """
        _check_ids(input_ids)
        if input_ids.shape[0] != 1:
            raise InputError(f"expected one prompt to explain, got {input_ids.shape[0]} rows")
        return self._current().explain(input_ids[0].tolist(), against, decode)

    def stats(self) -> CacheStats:
        """Return the counters over all fingerprints that the model had. A batch counts the blocks of each row."""
        return self._earlier if self._cache is None else _sum(self._earlier, self._cache.stats())

    def health(self) -> Health:
        """Return whether the store works, and one line about its state or the problem."""
        return self.store.health()

    def close(self) -> None:
        """Close the store. Later calls of `generate` compute everything."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- identity -----------------------------------------------------------------------------------------------------
    def _current(self) -> DistributedKVCache:
        """Return the cache of the fingerprint that the model has now."""
        if hf_models.stamp(self.model) != self._stamp:
            self.refresh()
        return self.cache

    def _bind(self, fit: hf_models.Fit) -> None:
        """Make a cache of the present fingerprint, unless there is one. Nothing changes if that is refused."""
        stamp = hf_models.stamp(self.model)  # first, so that a change during the hashing is noticed
        adapter = hf_models.adapter_digest(self.model)
        if fit.dtype not in PRECISION_OF:
            raise ConfigError(f"expected a model of float32, float16 or bfloat16, got KV of {fit.dtype}")
        computed = PRECISION_OF[fit.dtype]
        precision = self._precision or computed
        fingerprint, origin = hf_models.fingerprint(self.model, self._tokenizer, adapter, fit.dtype)
        cache = self._cache
        if cache is None or cache.namespace.fingerprint != fingerprint:
            spec = KVSpec(fit.layers, fit.heads, fit.head_dim, fit.dtype, fingerprint, origin)
            cache = DistributedKVCache(store=self.store, model=spec, precision=precision, **self._options)
            self.shadow.precision = max(cache.precision, computed, key=TOLERANCE.__getitem__)
            cache.describe_every_s = self._describe_every_s
            self._earlier, self._cache = self.stats(), cache
        self._stamp, self._fit = stamp, fit

    # --- one call -----------------------------------------------------------------------------------------------------
    def _setting(self, name: str, settings: Mapping[str, Any]) -> Any:
        """Return the value that `generate` will use: of the call, of its generation_config, or of the model's."""
        if name in settings:
            return settings[name]
        given = getattr(settings.get("generation_config"), name, None)
        return given if given is not None else getattr(self.model.generation_config, name, None)

    def _check(self, input_ids: Tensor, settings: Mapping[str, Any]) -> None:
        if problem := hf_models.state_problem(self.model):
            raise InputError(problem)
        _check_ids(input_ids)
        for name in settings.keys() - CALL_SETTINGS - GENERATION_FIELDS:
            if settings[name] is None:
                continue
            raise InputError(
                f"expected input_ids and settings of generation, got {name}; the block keys do not cover it, so call "
                "model.generate for this request"
            )
        if settings.get("use_cache") is False:
            raise InputError("expected use_cache=True, which this call is about; call model.generate without a cache")
        for name, allowed in ONE_ROW_EACH.items():
            if (value := self._setting(name, settings)) not in allowed:
                raise InputError(f"expected {name} unset, got {value!r:.60}; call model.generate for this request")
        self._check_padding(input_ids, settings)

    def _check_padding(self, input_ids: Tensor, settings: Mapping[str, Any]) -> None:
        mask, pad = settings.get("attention_mask"), self._setting("pad_token_id", settings)
        if mask is not None and (tuple(mask.shape) != tuple(input_ids.shape) or not bool((mask == 1).all())):
            raise InputError(
                f"expected rows of equal length without padding, got an attention_mask of {tuple(mask.shape)} that "
                "does not keep every token; group requests by length, or call generate once per row"
            )
        # Without a mask, `model.generate` takes the pad token for padding, unless it also ends a text.
        if mask is None and pad is not None and int(pad) not in self._eos(settings) and bool((input_ids == pad).any()):
            raise InputError(
                f"expected a prompt without the pad token {int(pad)}; group requests by length, or pass an "
                "attention_mask of ones if it is part of the text"
            )

    def _eos(self, settings: Mapping[str, Any]) -> set[int]:
        ids = self._setting("eos_token_id", settings)
        return set() if ids is None else set(torch.as_tensor(ids).flatten().tolist())

    def _load(self, cache: DistributedKVCache, rows: Sequence[list[int]], found: int, past: Any, most: int) -> int:
        """Give `past` up to `most` tokens of KV. Return how many tokens of every row the store had."""
        fit, got = self._fit, found
        kv = torch.empty(fit.layers, 2, len(rows), fit.heads, found, fit.head_dim, dtype=fit.dtype)
        for n, row in enumerate(rows):
            got = cache.load(row, 0, got, kv[:, :, n, :, :got])  # of the next rows no more is of use
        if used := min(got, most):
            for layer, (planes, device) in enumerate(zip(kv[..., :used, :], fit.devices, strict=True)):
                past.update(planes[0].to(device), planes[1].to(device), layer)
        return got

    def _run(self, input_ids: Tensor, past: Any, settings: Mapping[str, Any]) -> Any:
        call = {**settings, "attention_mask": torch.ones_like(input_ids), hf_models.CACHE_NAME: past}
        if settings.get("generation_config") is not None:  # transformers warns about a config next to settings
            call["generation_config"] = copy.deepcopy(settings["generation_config"])
            call["generation_config"].use_cache = True
        else:
            call["use_cache"] = True  # a config saved by training may turn it off
        return self.model.generate(input_ids=input_ids, **call)

    def _end(self, row: Sequence[int], T: int, settings: Mapping[str, Any]) -> int:
        """Return how many tokens of a row to save: all but the last, whose KV was not computed, and no padding."""
        eos = self._eos(settings)
        end = next((i + 1 for i in range(T, len(row)) if row[i] in eos), len(row))
        return min(end, len(row) - 1)

    def _save(self, cache: DistributedKVCache, tokens: Sequence[int], past: Any, n: int, start: int) -> int:
        if len(tokens) // cache.block_tokens <= start // cache.block_tokens:
            return 0
        return cache.save(tokens, _row(past, n, start, len(tokens)), start)

    def _compare(self, cache: DistributedKVCache, rows: Sequence[Sequence[int]], past: Any) -> None:
        B = cache.block_tokens
        for n, row in enumerate(rows):
            computed = _row(past, n, 0, len(row))
            stored = torch.empty_like(computed)
            for i in range(cache.load(row, 0, len(row), stored) // B):
                here, key = slice(i * B, (i + 1) * B), cache.namespace.keys(row)[i]
                self.shadow.compare(stored[..., here, :], computed[..., here, :], f"block {i}, key {key.hex()}")

    def _misses(self, cache: DistributedKVCache) -> Counter[str]:
        """Return the counted reasons for misses, and for faults of the store: a failed `match` is not a miss."""
        return cache.stats().misses + self.store.stats().faults


def _reason(full: int, got: int, misses: Counter[str]) -> str:
    if got >= full:
        return "" if full else SHORT
    del misses[Reason.GAP]
    return str(next(iter(misses), Reason.ABSENT))


def _row(past: Any, n: int, start: int, stop: int) -> Tensor:
    """Return the KV [L, P, H, stop, D] of row n on the CPU, undefined before `start`: no block there is read."""
    first = past.layers[0].keys
    _, H, _, D = first.shape
    kv = torch.empty(len(past.layers), 2, H, stop, D, dtype=first.dtype)
    for layer, planes in zip(past.layers, kv, strict=True):
        planes[0, :, start:] = layer.keys[n, :, start:stop]
        planes[1, :, start:] = layer.values[n, :, start:stop]
    return kv


def _check_ids(input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"expected input_ids as a tensor of integers [N, T], got {got}")
    if not input_ids.numel():
        raise InputError(f"expected a prompt of at least one token, got input_ids of {tuple(input_ids.shape)}")


def _sum(a: CacheStats, b: CacheStats) -> CacheStats:
    return CacheStats(**{field.name: getattr(a, field.name) + getattr(b, field.name) for field in fields(CacheStats)})


def _store_of(store: str | Store, ttl_seconds: float | None) -> Store:
    if isinstance(store, Store):
        if ttl_seconds != DAY_S:
            raise ConfigError("expected no ttl_seconds= with a Store object: it has a TTL of its own")
        return store
    if not isinstance(store, str):
        raise ConfigError(f"expected store= as a URL or a kvlab.stores.Store, got {described(store)}")
    return open_store(store, ttl_s=ttl_seconds)


def _tokenizer_of(folder: str | Path | None) -> bytes:
    if folder is None:
        return b""
    file = Path(folder) / TOKENIZER
    try:
        return tokenizer_digest(file.read_bytes(), str(file))
    except OSError as error:
        raise ConfigError(f"expected a folder with {TOKENIZER}, got {folder} ({error})") from error
