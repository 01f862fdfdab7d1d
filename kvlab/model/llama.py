"""A Llama decoder in plain PyTorch with an explicit KV cache.

    token -> embedding -> L x ( RMSNorm, attention, RMSNorm, SwiGLU ) -> RMSNorm -> logits

Inference libraries hide the KV cache inside the model. Here it is an argument: the caller owns one
tensor `kv` of shape [L, P, N, H, C, D]. The model writes the keys and values of the new tokens into
`kv`, and attends to all earlier tokens. If the caller fills the first `start` positions from another
source, such as a store, their prefill is skipped.

Axes: L layers, P planes (0 keys, 1 values), N batch, H KV heads, T new tokens, C capacity in
tokens, D head dim. Keys are stored after RoPE, so a cached key is valid only at its position.

`kvlab.model.load` reads weights from disk. Sources: Touvron et al., 2023 (Llama), Su et al., 2021
(RoPE), Ainslie et al., 2023 (GQA), Shazeer, 2020 (SwiGLU), Zhang and Sennrich, 2019 (RMSNorm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvlab.errors import InputError, ModelError

if TYPE_CHECKING:
    from kvlab.model.digests import Digests

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
RaggedAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""See `Llama.forward_ragged`."""


class LayerKV(Protocol):
    """The KV of one layer, if it is not in one tensor."""

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write the keys and values [N, H, T, D] of new tokens, and return those of all start + T tokens so far."""
        ...


class KV(Protocol):
    """The KV of all layers with room for `capacity` tokens, if it is not in one tensor: see `kvlab.engine.pages`."""

    @property
    def capacity(self) -> int:
        """The number of tokens that fit."""
        ...

    def __getitem__(self, layer: int) -> LayerKV: ...


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of RoPE for long contexts: "llama3" (Llama 3.1 and later) or the older "linear".

    The fields are hashed in the fingerprint. A new field would change the fingerprint of every scaled model,
    so another kind of scaling needs a class of its own.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The config of one Llama. The names follow Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square and multiplies it by a weight. [..., hidden] -> same."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in FP32 for every dtype, because the mean of squares overflows FP16."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Return the angular frequency of each pair of dimensions in radians per token. Shape [D / 2], FP32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    s = config.rope_scaling
    if s is None:
        return freq
    if s.kind == "linear":
        return freq / s.factor
    if s.kind != "llama3":
        raise ModelError(f"expected a RoPE scaling of llama3 or linear, got {s.kind!r}")
    # "llama3" keeps high frequencies, divides low ones by the factor, and interpolates between them.
    turns = s.original_context * freq / (2 * math.pi)
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * freq + (1 - keep) * freq / s.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by the angle of its position. x [N, H, T, D], cos and sin [T, D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Return the causal attention of T new tokens to themselves and to the `start` tokens before them.

    Shapes: q [N, heads, T, D]; k, v [N, H, start + T, D]; result [N, heads, T, D]. H divides heads
    (GQA). New token t attends to positions 0 … start + t.
    """
    T, S, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if T == 1 or start == 0:  # these two cases need no mask, so faster kernels apply
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
    if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, gqa)):  # on a GPU: it needs no mask here either
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), enable_gqa=gqa)
    sees = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(start)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=gqa)


def _at_once(device: torch.device) -> AbstractContextManager[Any]:
    """Leave out cuDNN's attention on a GPU: it first builds a plan for each new length, which can take 0.4 seconds.

    Torch prefers it on Hopper and Blackwell. Every decode step has a new length.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels) if device.type == "cuda" else nullcontext()


class SelfAttention(nn.Module):
    """Attention with H KV heads. Each KV head serves heads / H query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv: Tensor | LayerKV | None, start: int, attend: Attention
    ) -> Tensor:
        """[N, T, hidden] -> same. Writes positions start … start + T - 1 of this layer's `kv` [P, N, H, C, D]."""
        N, T, _ = x.shape
        q, k, v = (
            proj(x).view(N, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if isinstance(kv, Tensor):
            kv[0, :, :, start : start + T] = k
            kv[1, :, :, start : start + T] = v
            k, v = kv[:, :, :, : start + T]
        elif kv is not None:
            k, v = kv.extend(k, v, start)
        out = attend(q, k, v, start)
        return cast(Tensor, self.o_proj(out.transpose(1, 2).reshape(N, T, -1)))


class SwiGLU(nn.Module):
    """The feed-forward network. A gate scales each hidden unit. [N, T, hidden] -> same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        inner, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Process each token independently, so no cache is needed."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """One decoder layer: attention, then SwiGLU. Each adds its result to its input."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv: Tensor | LayerKV | None, start: int, attend: Attention
    ) -> Tensor:
        """[N, T, hidden] -> same; see `SelfAttention.forward` for `kv`."""
        x = x + self.self_attn(self.input_layernorm(x), rope, kv, start, attend)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and last norm. This class gives the weights Hugging Face's names `model.…`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The complete model.

    `attend` replaces the attention function: notebook 01 passes the learner's own function. A
    function that computes other numbers needs another fingerprint: `spec_of(model, adapter=…)`.
    `folder` is the folder of the loaded weights, and `digests` are the digests of the loaded files,
    for the fingerprint (`kvlab.model.fingerprint`). Code that changes weights in memory must set
    `model.folder = None`: the fingerprint is then computed from the weights in memory.
    """

    def __init__(self, config: LlamaConfig, attend: Attention = attention) -> None:
        super().__init__()
        self._config = config
        self.attend = attend
        self.folder: Path | None = None
        self.digests: Digests | None = None
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._angles = torch.empty(0)  # `rope` extends it as needed

    @property
    def config(self) -> LlamaConfig:
        """The config of the model. It cannot be replaced, because the layers would not change."""
        return self._config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, which is also the dtype of the KV."""
        return self.lm_head.weight.dtype

    def new_kv(self, capacity: int, batch: int = 1) -> Tensor:
        """Return an uninitialised KV tensor for `capacity` tokens. Shape [L, P, N, H, capacity, D].

        Only positions that were written may be read.
        """
        c = self.config
        shape = (c.num_hidden_layers, 2, batch, c.num_key_value_heads, capacity, c.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def forward(self, tokens: Tensor, kv: Tensor | KV | None = None, start: int = 0, last_only: bool = False) -> Tensor:
        """Run T new tokens at positions start … start + T - 1.

        Args:
            tokens: int64 [N, T].
            kv: [L, P, N, H, C, D] whose first `start` positions are filled, or a block table
                (`kvlab.engine.pages`). Positions start … start + T - 1 are written. With None, nothing
                is stored, and `start` must be 0.
            last_only: compute only the logits of the last token. Decoding needs no others.

        Returns:
            Logits [N, T, vocab], or [N, 1, vocab] with `last_only`.

        Raises:
            InputError: the positions do not fit into `kv` or into the model's context, or `kv` is
                missing.
        """
        T = tokens.shape[1]
        self._check_room(T, kv, start)
        x = self.model.embed_tokens(tokens)
        rope = self.rope(start, T)
        with _at_once(self.device):
            for i, layer in enumerate(self.model.layers):
                x = layer(x, rope, None if kv is None else kv[i], start, self.attend)
        if last_only:
            x = x[:, -1:]
        return cast(Tensor, self.lm_head(self.model.norm(x)))

    def forward_ragged(self, tokens: Tensor, positions: Tensor, last: Tensor, attend: RaggedAttention) -> Tensor:
        """Run new tokens of several sequences in one pass of the weights.

        Only attention looks at more than one token, so only attention must know which tokens belong together.

        Args:
            tokens, positions: int64 [T], sequence after sequence.
            last: int64 [N], where in `tokens` each sequence's last token is.
            attend: stores the new keys and values of a layer, and attends for each sequence:
                (layer, q [1, heads, T, D], k [1, H, T, D], v) -> [1, heads, T, D].

        Returns:
            Logits [N, vocab] of the last tokens.
        """
        x = self.model.embed_tokens(tokens[None])
        angles = self._angles_before(int(positions.max()) + 1)[positions]
        rope = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        with _at_once(self.device):
            for i, layer in enumerate(self.model.layers):
                x = layer(x, rope, None, 0, lambda q, k, v, _, i=i: attend(i, q, k, v))
        return cast(Tensor, self.lm_head(self.model.norm(x[0, last])))

    def check_tokens(self, tokens: Sequence[int], new_tokens: int = 0) -> Tensor:
        """Convert a prompt to an int64 tensor [1, T].

        Raises:
            InputError: the prompt is empty, a token is not in the vocabulary, or the prompt and
                `new_tokens` further tokens exceed the context.
        """
        try:
            ids = torch.as_tensor(tokens, device=self.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"expected a sequence of tokens, got {type(tokens).__name__} ({error})") from error
        if ids.ndim != 1 or ids.numel() == 0:
            raise InputError(f"expected a prompt of at least one token, got shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"expected integer tokens, got {ids.dtype}")
        ids = ids.to(torch.int64, copy=True)  # the caller may change its own tokens later
        low, high, vocab = int(ids.min()), int(ids.max()), self.config.vocab_size
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise InputError(f"expected tokens in 0 … {vocab - 1}, got {bad}; check the tokenizer")
        room = self.config.max_position_embeddings
        if ids.numel() + new_tokens > room:
            raise InputError(
                f"the model's context is {room} tokens, got a prompt of {ids.numel()} plus {new_tokens} new tokens"
            )
        return ids[None]

    def _check_room(self, T: int, kv: Tensor | KV | None, start: int) -> None:
        context = self.config.max_position_embeddings
        capacity = kv.shape[4] if isinstance(kv, Tensor) else context if kv is None else kv.capacity
        room = min(context, capacity)
        if start < 0 or start + T > room:
            raise InputError(f"{T} tokens at position {start} do not fit; there is room for {room}")
        if kv is None and start:
            raise InputError(f"start is {start}, but without kv there are no earlier tokens to attend to")

    def rope(self, start: int, T: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, D/2] for positions start … start + T - 1, in the model's dtype.

        Angles are computed and stored in FP32, because an FP16 angle near position 4000 is off by up
        to 1 radian.
        """
        angles = self._angles_before(start + T)[start : start + T]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _angles_before(self, end: int) -> Tensor:
        """Return the angles of `end` positions or more. Another thread may replace `_angles` at any time."""
        angles = self._angles
        ready = angles.shape[0] if angles.device == self.device else 0
        if end > ready:
            positions = torch.arange(max(end, 2 * ready), dtype=torch.float32)
            angles = self._angles = torch.outer(positions, rope_frequencies(self.config)).to(self.device)
        return angles

    # --- torch methods that change the weights, so that the loaded digests no longer apply
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights as in torch. The folder and the digests are reset."""
        self.folder = self.digests = None
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Implement `half`, `to` and similar. Another dtype rounds the weights, so the digests are reset."""
        before = self.dtype
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.dtype != before:
            self.folder = self.digests = None
        return self
