"""Ours against Hugging Face's: the same numbers from the same folder, whatever kind of Llama it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab.engine import generate
from kvlab.model import PRETRAINED, Llama, load_model
from tests.harness.helpers import edit_json
from tests.model.folders import EMBEDDING, HEAD, save_weights, weights_of, with_tensors
from tests.model.test_config import PAIRS

pytestmark = pytest.mark.hf
TOLERANCE = 1e-4
NEW_TOKENS = 32

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
KINDS: dict[str, dict[str, Any]] = {
    f"gqa {4 // kv}, head dim {dim}, {'tied' if tied else 'untied'}": {
        "num_key_value_heads": kv,
        "head_dim": dim,
        "tie_word_embeddings": tied,
    }
    for kv in (4, 2, 1)
    for dim in (32, 80)
    for tied in (True, False)
}
KINDS |= {
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True, "attention_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "linear rope": {"rope_parameters": LINEAR},
    "other theta and eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
}


def theirs(folder: Path) -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def saved(folder: Path, shard: str = "5GB", **changes: Any) -> Path:
    """A random Llama as transformers writes it, with biases and norms that are not all zero and one."""
    import transformers

    sizes = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    more = {"num_attention_heads": 4, "max_position_embeddings": 256, "eos_token_id": None, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **more, **changes}))
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def check_agreement(folder: Path, rows: torch.Tensor, ours: Llama | None = None) -> None:
    """Logits within 1e-4, alone and in a batch of two; the same greedy continuation."""
    ours, other = ours or load_model(folder), theirs(folder)
    with torch.inference_mode():
        want = other(rows).logits
        assert float((ours(rows) - want).abs().max()) < TOLERANCE
        assert float((ours(rows[:1]) - want[:1]).abs().max()) < TOLERANCE
    prompt = rows[0, :40].tolist()
    got = generate(ours, prompt, NEW_TOKENS, stop_at_eos=False).tokens
    assert got == greedy(other, prompt)


@torch.inference_mode()
def greedy(other: Any, prompt: list[int]) -> list[int]:
    """Without any cache: the whole text through the model for every token."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(other(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def rows_of(vocab: int, count: int = 120) -> torch.Tensor:
    return torch.randint(0, vocab, (2, count), generator=torch.Generator().manual_seed(3))


def test_the_shipped_model_agrees(model: Llama, sample: list[int]) -> None:
    check_agreement(PRETRAINED, torch.tensor([sample[:200], sample[5000:5200]]), model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_agrees(tmp_path: Path, kind: str) -> None:
    check_agreement(saved(tmp_path, **KINDS[kind]), rows_of(131))


def test_a_sharded_model_agrees(tmp_path: Path) -> None:
    saved(tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_agreement(tmp_path, rows_of(131))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    import transformers

    transformers.LlamaForCausalLM.from_pretrained(saved(tmp_path / "a"), dtype=dtype).save_pretrained(tmp_path / "b")
    check_agreement(tmp_path / "b", rows_of(131))


def contradicting(folder: Path, base: dict[str, Any], changes: dict[str, Any], head: str = "") -> Path:
    """A saved model whose config.json says something else than its file, or twice."""
    saved(folder, **base)
    edit_json(folder / "config.json", **changes)
    if head:
        weights = weights_of(folder)
        weights[HEAD] = weights[EMBEDDING].flip(0) if head == "another" else weights[EMBEDDING].clone()
        if head == "alone":
            del weights[EMBEDDING]
        save_weights(folder, weights)
    return folder


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    name: {"changes": changes}
    for name, (changes, _, _) in PAIRS.items()
} | {
    f"tied, and the head stored is {head}": {"base": {"tie_word_embeddings": True}, "head": head}
    for head in ("another", "the same", "alone")
} | {
    "untied, and the head is the embedding": {"head": "the same"},
    "the same function by another name": {"changes": {"hidden_act": "swish"}},
    "full attention, said for every layer": {"changes": {"layer_types": ["full_attention"] * 3}},
    "two dtypes": {"changes": {"dtype": "float32", "torch_dtype": "float16"}},
    "tensor parallel training": {"changes": {"pretraining_tp": 2}},
    "dropout": {"changes": {"attention_dropout": 0.5}},
    "a context without end": {"changes": {"max_position_embeddings": 10**13}},
    "null where a default is": {"changes": {"head_dim": None}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_folder_that_contradicts_itself_means_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    case = {"base": {}, "changes": {}, **CONTRADICTIONS[name]}
    folder = contradicting(tmp_path, **case)
    ours, rows = load_model(folder), rows_of(131)
    with torch.inference_mode():
        assert float((ours(rows) - theirs(folder)(rows).logits).abs().max()) < TOLERANCE


@pytest.mark.parametrize("where", ["layers", "model"])
def test_rotary_buffers_that_say_something_else_are_ignored_by_both(tmp_path: Path, where: str) -> None:
    names = {
        "model": ["model.rotary_emb.inv_freq"],
        "layers": [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)],
    }
    with_tensors(**{name: torch.ones(8) for name in names[where]})(saved(tmp_path))
    check_agreement(tmp_path, rows_of(131))


def test_a_stray_file_is_ignored_by_both(tmp_path: Path) -> None:
    saved(tmp_path)
    save_weights(tmp_path, {n: t + 1 for n, t in weights_of(tmp_path).items()}, "model_old.safetensors")
    check_agreement(tmp_path, rows_of(131))


@pytest.mark.parametrize(
    ("generation", "eos"), [({"eos_token_id": [0, 7]}, 5), ({"eos_token_id": 7}, 5), (None, 5), (None, [5, 6])], ids=str
)
def test_the_end_of_a_text_is_the_one_of_transformers(tmp_path: Path, generation: Any, eos: Any) -> None:
    saved(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=eos)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    want = theirs(tmp_path).generation_config.eos_token_id
    assert load_model(tmp_path).config.eos_token_ids == tuple(want if isinstance(want, list) else [want])


def test_the_cache_of_transformers_holds_our_kv(tmp_path: Path) -> None:
    """Keys after RoPE, by KV head, layer by layer: what a connector may hand over without a change."""
    folder = saved(tmp_path, num_key_value_heads=2, rope_parameters=LLAMA3)
    ours, rows = load_model(folder), rows_of(131, 50)
    kv = ours.new_kv(50, batch=2)
    with torch.inference_mode():
        ours(rows, kv)
        layers = theirs(folder)(rows, use_cache=True).past_key_values.layers
    for i, layer in enumerate(layers):
        torch.testing.assert_close(kv[i, 0], layer.keys, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(kv[i, 1], layer.values, rtol=0, atol=TOLERANCE)


def test_the_tokenizer_of_transformers_gives_our_tokens(tokenizer: Any) -> None:
    import transformers

    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(PRETRAINED / "tokenizer.json"))
    text = "def größer(x: int) -> bool:\n\treturn x > 3  # 🙂\n"
    assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_kinds_of_rope_are_as_transformers_writes_them(tmp_path: Path) -> None:
    """The test above is about scaling only if the saved config really has it."""
    config = json.loads((saved(tmp_path, rope_parameters=LLAMA3) / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert load_model(tmp_path).config.rope_scaling is not None
