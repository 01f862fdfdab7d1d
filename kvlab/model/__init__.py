"""A readable Llama (`llama`), its loader (`load`), its tokenizer (`tokenizer`) and its `fingerprint`."""

from kvlab.model.llama import Llama, LlamaConfig, attention
from kvlab.model.load import PRETRAINED, load_model
from kvlab.model.tokenizer import Tokenizer, held_out, held_out_tokens

__all__ = [
    "PRETRAINED",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "attention",
    "held_out",
    "held_out_tokens",
    "load_model",
]
