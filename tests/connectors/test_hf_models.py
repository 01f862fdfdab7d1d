"""Which models of transformers are accepted, and what changes their identity: weights, adapters, dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvlab import MemoryStore
from kvlab.cache import describe
from kvlab.core.seals import Xxh3
from kvlab.errors import ConfigError, InputError
from tests.connectors.models import NO_SPECIALS, SIZES, TEXT, answer, build, cached, check, ids_of, plain, prompt, tiny

pytestmark = pytest.mark.hf


def fit(model: Any) -> Any:
    from kvlab.connectors import hf_models

    return hf_models.fit(model)


# --- which models fit -----------------------------------------------------------------------------------
def t5() -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return build("T5ForConditionalGeneration", "T5Config", **sizes)


def mixed() -> Any:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return build(
        "Qwen2ForCausalLM", "Qwen2Config", **WITHOUT_DIM, use_sliding_window=True, sliding_window=8, layer_types=kinds
    )


def mamba() -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return build("MambaForCausalLM", "MambaConfig", **sizes)


def mla() -> Any:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 3,
    }
    sizes = {name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
    return build("DeepseekV3ForCausalLM", "DeepseekV3Config", **sizes, num_key_value_heads=4, **ranks, **experts)


def chunked() -> Any:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 8}
    return build("Llama4ForCausalLM", "Llama4TextConfig", **SIZES, **NO_SPECIALS, **experts)


def rope(kind: str, **more: Any) -> Callable[[], Any]:
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}
    return lambda: tiny(rope_parameters=parameters)


def offloaded() -> Any:
    model = tiny()
    model.lm_head.to("meta")
    return model


def with_cache_implementation() -> Any:
    model = tiny()
    model.generation_config.cache_implementation = "static"
    return model


WITHOUT_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
LONG = {"original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an encoder-decoder": (t5, "encoder"),
    "a sliding window": (lambda: tiny("mistral", sliding_window=8), "DynamicSlidingWindowLayer"),
    "some sliding windows": (mixed, "DynamicSlidingWindowLayer"),
    "chunked attention": (chunked, "DynamicSlidingWindowLayer"),
    "linear attention": (mamba, "LinearAttentionLayer"),
    "MLA": (mla, "same shape"),
    "bidirectional attention": (lambda: tiny(is_causal=False), "bidirectional"),
    "bidirectional attention of Gemma": (lambda: tiny("gemma", use_bidirectional_attention=True), "bidirectional"),
    "dynamic RoPE": (rope("dynamic", **DYNAMIC), "dynamic"),
    "LongRoPE": (rope("longrope", **LONG), "longrope"),
    "another kind of cache": (with_cache_implementation, "cache_implementation"),
    "offloaded weights": (offloaded, "meta"),
    "training mode": (lambda: tiny().train(), "eval"),
    "float64": (lambda: tiny().double(), "float64"),
    "no model": (lambda: nn.Linear(2, 2), "causal LM"),
}
ACCEPTED: dict[str, Callable[[], Any]] = {
    "no sliding window": lambda: tiny("mistral"),
    "sliding windows turned off": lambda: tiny("qwen2", use_sliding_window=False, sliding_window=8),
    "causal attention": lambda: tiny(is_causal=True),
    "causal attention of Gemma": lambda: tiny("gemma", use_bidirectional_attention=False),
    "linear RoPE": rope("linear"),
    "RoPE of Llama 3": rope("llama3", **LLAMA3),
    "YaRN": rope("yarn", original_max_position_embeddings=64),
    "weights in memory": tiny,
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_without_plain_kv_are_refused(case: str) -> None:
    make, text = REFUSED[case]
    with pytest.raises(ConfigError, match=text):
        cached(make())


@pytest.mark.parametrize("case", ACCEPTED)
def test_models_beside_them_are_accepted_and_right(case: str) -> None:
    wrapped = cached(ACCEPTED[case]())
    text = prompt(100)
    check(wrapped, text, 0, "absent")
    check(wrapped, text, 96, "")


def test_autocast_at_construction_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        cached(tiny())


@pytest.mark.parametrize("causal", [True, False])
def test_attention_to_later_tokens_is_noticed_whatever_the_config_says(causal: bool) -> None:
    model = tiny(is_causal=causal)

    from kvlab.connectors import hf_models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_models, "_check_config", lambda model: None)
        if causal:
            assert fit(model).layers == 3
        else:
            with pytest.raises(ConfigError, match="sees later ones"):
                fit(model)


def test_a_model_that_fails_or_ignores_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model, "forward", lambda **inputs: None)
    with pytest.raises(ConfigError, match="got nothing in layer 0"):
        cached(model)
    monkeypatch.setattr(model, "forward", lambda: None)
    with pytest.raises(ConfigError, match="TypeError"):
        cached(model)


@pytest.mark.parametrize(("kind", "heads", "dim"), [("llama", 2, 16), ("qwen2", 2, 8), ("gpt2", 4, 8)])
def test_the_shape_is_that_of_the_kv(kind: str, heads: int, dim: int) -> None:
    found = fit(tiny(kind))
    assert (found.layers, found.heads, found.head_dim, found.dtype) == (3, heads, dim, torch.float32)
    assert found.devices == (torch.device("cpu"),) * 3


# --- weights that change --------------------------------------------------------------------------------
def train(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        model.requires_grad_(True)
        with torch.enable_grad():
            model(input_ids=ids_of(TEXT), labels=ids_of(TEXT)).loss.backward()
        optimizer(model.parameters(), lr=0.01, **options).step()
        model.zero_grad()
        model.requires_grad_(False)

    return step


def load_other(model: Any) -> None:
    model.load_state_dict({name: 1.5 * weight for name, weight in model.state_dict().items()})


def write_through_data(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)


def give_other_data(model: Any) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data * 1.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "SGD": train(torch.optim.SGD),
    "AdamW": train(torch.optim.AdamW, foreach=False),
    "AdamW foreach": train(torch.optim.AdamW, foreach=True),
    "AdamW fused": train(torch.optim.AdamW, fused=True),
    "load_state_dict": load_other,
    ".data written": write_through_data,
    ".data replaced": give_other_data,
    "bf16": lambda model: model.to(torch.bfloat16),
    "bf16 and back": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_noticed(change: str) -> None:
    store, model = MemoryStore(), tiny()
    wrapped = cached(model, store)
    check(wrapped, TEXT, 0, "absent")
    before = wrapped._cache.namespace
    CHANGES[change](model)
    answer(wrapped, TEXT)
    assert wrapped.last.cached_tokens == 0 and wrapped._cache.namespace.fingerprint != before.fingerprint
    if change != "bf16":
        check(wrapped, TEXT, 47, "")
    stats = wrapped.stats()
    assert stats.stored == 6 and wrapped._cache.stats().stored == 3  # counters go on
    assert len(describe.read_all(store, Xxh3())) == 2


def test_frequencies_that_a_cast_rounded_are_another_identity() -> None:
    """The weights are the same, bit by bit, and the keys are not."""
    import transformers

    exact = tiny().to(torch.bfloat16).float().state_dict()  # numbers that bf16 holds
    model = tiny()
    model.load_state_dict(exact)
    wrapped = cached(model)
    check(wrapped, TEXT, 0, "absent")
    before = last_keys(model)
    model.to(torch.bfloat16).float()
    assert all(torch.equal(weight, exact[name]) for name, weight in model.state_dict().items())
    assert not torch.allclose(last_keys(model), before, rtol=0, atol=1e-3)
    check(wrapped, TEXT, 0, "absent")

    cast = tiny().to(torch.bfloat16)
    made = transformers.LlamaForCausalLM._from_config(cast.config, dtype=torch.bfloat16).eval()
    made.load_state_dict(cast.state_dict())
    assert made.dtype == cast.dtype and made.model.rotary_emb.inv_freq.dtype == torch.float32
    assert cached(made)._cache.namespace.fingerprint != cached(cast)._cache.namespace.fingerprint


def last_keys(model: Any) -> Tensor:
    """The keys of the last layer."""
    with torch.no_grad():
        output = model(input_ids=ids_of(TEXT), use_cache=True)
    cache: Any = output.cache if "cache" in output else output.past_key_values
    return cache.layers[-1].keys.clone()


def test_a_config_that_stops_to_fit_is_refused_at_the_next_call() -> None:
    model = tiny()
    wrapped = cached(model)
    check(wrapped, TEXT, 0, "absent")
    model.config.is_causal = False
    with pytest.raises(ConfigError, match="bidirectional"):
        answer(wrapped, TEXT)
    model.config.is_causal = True
    check(wrapped, TEXT, 47, "")
    model.double()
    for _ in range(2):  # a refusal is no news that the second call may forget
        with pytest.raises(ConfigError, match="float64"):
            answer(wrapped, TEXT)
    model.float()
    check(wrapped, TEXT, 47, "")


def test_what_changes_no_weight_keeps_the_blocks() -> None:
    model = tiny()
    wrapped = cached(model)
    check(wrapped, TEXT, 0, "absent")
    cache = wrapped._cache
    for same in (
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.to("cpu"),
        lambda: model.requires_grad_(True),
        wrapped.refresh,
    ):
        same()
        check(wrapped, TEXT, 47, "")
        assert wrapped._cache is cache


def test_one_number_written_through_data_needs_a_refresh() -> None:
    """What the documentation says that the check may miss."""
    model = tiny()
    wrapped = cached(model)
    check(wrapped, TEXT, 0, "absent")
    model.model.layers[0].self_attn.v_proj.weight.data[1, 1] += 50
    before = wrapped._cache
    answer(wrapped, TEXT)
    assert wrapped._cache is before
    wrapped.refresh()
    check(wrapped, TEXT, 0, "absent")


def test_the_precision_of_the_shadow_follows_the_dtype() -> None:
    model = tiny()
    wrapped = cached(model)
    assert (wrapped._cache.precision, wrapped.shadow.precision) == ("fp32", "fp32")
    model.to(torch.bfloat16)
    answer(wrapped, TEXT)
    assert (wrapped._cache.precision, wrapped.shadow.precision) == ("bf16", "bf16")
    assert cached(tiny(), precision="int8").shadow.precision == "int8"
    assert cached(tiny().to(torch.bfloat16), precision="fp32").shadow.precision == "bf16"


@pytest.mark.parametrize(
    "other",
    [
        {"num_attention_heads": 2},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=str,
)
def test_the_same_weights_under_another_config_are_another_model(other: dict[str, Any]) -> None:
    changes = {"num_key_value_heads": 2, "num_attention_heads": 2, "hidden_size": 32}
    one, two = tiny(**changes), tiny(**{**changes, **({} if "num_attention_heads" in other else other)})
    two.load_state_dict(one.state_dict())
    same = cached(one)._cache.namespace == cached(two)._cache.namespace
    assert same == ("num_attention_heads" in other)


def test_other_code_for_the_same_weights_is_another_model() -> None:
    import transformers

    class Changed(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    model = tiny()
    other = Changed(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert cached(model)._cache.namespace != cached(other)._cache.namespace


def test_the_tokenizer_is_part_of_the_identity(tmp_path: Any) -> None:
    names = []
    for content in ('{"model": 1}', '{"model": 2}', '{"version": "1.0", "model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        names.append(cached(tiny(), tokenizer=tmp_path)._cache.namespace)
    assert names[0] == names[2] != names[1] and cached(tiny())._cache.namespace not in names


# --- adapters -------------------------------------------------------------------------------------------
class Tuner(nn.Module):
    """A LoRA layer with the attributes of PEFT's, so that these tests run without it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(3)
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.lora_b = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))
        self.active_adapters, self.merged_adapters = ["default"], list[str]()
        self.disable_adapters, self.scaling = False, {"default": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.disable_adapters or self.merged_adapters else y + x @ self.delta().T

    def delta(self) -> Tensor:
        return self.scaling["default"] * self.lora_b @ self.lora_a

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta()
        self.merged_adapters.append("default")


def tuners(model: Any) -> Iterator[Tuner]:
    return (module for module in model.modules() if isinstance(module, Tuner))


def with_tuners() -> Any:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.v_proj = Tuner(layer.self_attn.v_proj)
    return model.requires_grad_(False).eval()


def set_all(**values: Any) -> Callable[[Any], None]:
    return lambda model: [setattr(t, name, value) for t in tuners(model) for name, value in values.items()] and None


def merge_all(model: Any) -> None:
    for tuner in tuners(model):
        tuner.merge()


OWN_STATES: dict[str, Callable[[Any], Any]] = {
    "on": lambda model: None,
    "off": set_all(disable_adapters=True),
    "scaled": set_all(disable_adapters=False, scaling={"default": 0.25}),
    "scaled back": set_all(scaling={"default": 0.5}),
    "merged": merge_all,
}


def with_peft() -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(tiny(), config)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.5)
    return model.requires_grad_(False).eval()


def scaled(factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.enable_adapter_layers()
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.set_scale("default", factor)

    return change


PEFT_STATES: dict[str, Callable[[Any], Any]] = {
    "on": lambda model: None,
    "off": lambda model: model.disable_adapter_layers(),
    "scaled": scaled(0.5),
    "scaled back": scaled(1.0),
    "merged": lambda model: model.merge_adapter(),
    "merged, and back": lambda model: model.unmerge_adapter(),
}


@pytest.mark.parametrize(("make", "states"), [(with_tuners, OWN_STATES), (with_peft, PEFT_STATES)], ids=["own", "peft"])
def test_every_state_of_an_adapter_has_its_own_blocks(make: Callable[[], Any], states: Any) -> None:
    model = make()
    wrapped, prints, answers = cached(model), {}, {}
    for state, change in states.items():
        change(model)
        if state == "scaled back":  # as it was: the blocks of "on" are found again
            check(wrapped, TEXT, 47, "")
        elif state == "merged, and back":  # as it was, up to rounding of the weights
            assert answer(wrapped, TEXT)[0] == answers["on"]
        else:
            (answers[state],) = check(wrapped, TEXT, 0, "absent")
            check(wrapped, TEXT, 47, "")
        prints[state] = wrapped._cache.namespace.fingerprint
    assert prints["on"] == prints["scaled back"] and len({prints[s] for s in ("on", "off", "scaled", "merged")}) == 4
    assert answers["on"] != answers["off"] and answers["on"] != answers["scaled"]
    adapters = {found.adapter for found in describe.read_all(wrapped.store, Xxh3())}
    assert len(adapters) >= 4 and "" not in adapters


def test_peft_disabled_for_some_calls_only() -> None:
    model = with_peft()
    wrapped = cached(model)
    (on,) = check(wrapped, TEXT, 0, "absent")
    with model.disable_adapter():
        (off,) = check(wrapped, TEXT, 0, "absent")
    assert on != off and off == plain(tiny(), ids_of(TEXT))[0]
    check(wrapped, TEXT, 47, "")


def test_a_second_adapter_of_peft() -> None:
    model = with_peft()
    wrapped = cached(model)
    (one,) = check(wrapped, TEXT, 0, "absent")
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.requires_grad_(False).eval()
    (two,) = check(wrapped, TEXT, 0, "absent")
    model.set_adapter("default")
    model.requires_grad_(False).eval()
    check(wrapped, TEXT, 0, "absent")  # the other adapter is among the weights now
    assert one != two and answer(wrapped, TEXT)[0] == one


def test_prefix_tuning_is_refused() -> None:
    """Its virtual tokens are in the cache and not in the prompt."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    for kind in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
        with pytest.raises(ConfigError, match="virtual tokens"):
            cached(peft.get_peft_model(tiny(), config).eval())


# --- what nothing in the fingerprint shows ---------------------------------------------------------------
def test_forward_hooks_are_refused_while_they_are_there() -> None:
    """A steering hook changes KV, and neither the weights nor the config show it."""
    model, text = tiny(), prompt(50)
    wrapped = cached(model)
    want = answer(wrapped, text)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.model.layers[0], register)(lambda *_: None)
        with pytest.raises(InputError, match="forward hooks"):
            answer(wrapped, text)
        with pytest.raises(ConfigError, match="forward hooks"):
            cached(model)
        handle.remove()
        assert answer(wrapped, text) == want and wrapped.last.cached_tokens == 48


def test_what_a_changed_model_computes_is_not_saved_under_the_old_fingerprint() -> None:
    """The weights change while the answer is generated."""
    model, text = tiny(), prompt(50)
    wrapped = cached(model)
    weight = model.model.layers[0].self_attn.k_proj.weight

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight.mul_(-1)
        return scores

    answer(wrapped, text, logits_processor=[change])
    assert wrapped.last.saved_blocks == 0
    answer(wrapped, text)
    assert wrapped.last.cached_tokens == 0 and wrapped.last.saved_blocks == 3
