"""The exercises of notebook 01, attention by hand: attention, going on after a prefix, the learner's first cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvlab.course.exercises.engine import Exercise, Wrong

Kept = dict[tuple[int, ...], Tensor]


# --- one head -----------------------------------------------------------------------------------
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one head. q and k are [T, D], v and the result [T, V]."""
    scores = q @ k.T / q.shape[1] ** 0.5  # [T, T]
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(diagonal=1)
    weights = scores.masked_fill(later, float("-inf")).softmax(dim=1)
    return weights @ v


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    seen: Callable[[Tensor], Tensor] = torch.tril,
    hidden: float = float("-inf"),
    dim: int = 1,
) -> Tensor:
    """`attend` with one step changed."""
    scores = q @ k.T / (q.shape[1] ** 0.5 if scale is None else scale)
    sees = seen(torch.ones(len(q), len(q), dtype=torch.bool))
    return scores.masked_fill(~sees, hidden).softmax(dim=dim) @ v


def _masks_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1).tril() @ v


def _matrices(T: int, D: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * T + 10 * D + width)
    return torch.randn(T, D, generator=g), torch.randn(T, D, generator=g), torch.randn(T, width, generator=g)


def _mask_times_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.T / q.shape[1] ** 0.5
    return (scores + torch.ones_like(scores).triu(1) * float("-inf")).softmax(dim=1) @ v


ATTEND = Exercise(
    name="attend",
    number="01.1",
    difficulty=2,
    reference=attend,
    cases=(_matrices(4, 2, 2), _matrices(5, 3, 3), _matrices(3, 9, 2), _matrices(1, 4, 4)),
    wrong=(
        Wrong(
            lambda q, k, v: _head(q, k, v, seen=lambda ones: ones.tril(-1)),
            "the mask hides a token from itself, and a row of -inf alone becomes NaN: a token sees itself",
        ),
        Wrong(
            _mask_times_infinity,
            "0 times -inf is NaN: put -inf where the mask is True, and do not multiply the mask by it",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, seen=torch.ones_like),
            "no token may see a later one: set those scores to -inf before the softmax",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, seen=lambda ones: ones.triu()),
            "the mask is turned around: row t is token t, and it sees the columns up to t",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, hidden=0.0),
            "a score of 0 still gets a share, because exp(0) is 1: hide with -inf",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, seen=lambda ones: ones.triu(1)),
            "the mask is the wrong way round: in masked_fill, True means hide, and what comes later must be hidden",
        ),
        Wrong(
            _masks_after_softmax,
            "the shares of a row must add up to 1: hide the scores before the softmax, not the shares after it",
        ),
        Wrong(lambda q, k, v: _head(q, k, v, scale=1.0), "step 2 is missing: divide the scores by the root of D"),
        Wrong(
            lambda q, k, v: _head(q, k, v, scale=q.shape[1]),
            "divide by the square root of D, not by D: D is q.shape[1]",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, scale=2**0.5),
            "the root of 2 fits the example by hand only: D is q.shape[1]",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, scale=v.shape[1] ** 0.5),
            "D is the length of a query, q.shape[1]; the values may have another length",
        ),
        Wrong(
            lambda q, k, v: _head(q, k, v, dim=0),
            "the softmax goes along a row, over the keys that one query compares: dim=1",
        ),
    ),
    hint="scores for all pairs are one product, q @ k.T; then scale, hide what is later, softmax of each row, times v",
    forbidden="attention",
    after="A kernel such as FlashAttention computes the same numbers without keeping the [T, T] table of scores.",
)


# --- many heads, after a prefix -----------------------------------------------------------------
def causal_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Attention of T new tokens over themselves and the `start` tokens before them."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    T, S = scores.shape[2:]
    sees = torch.arange(S) <= start + torch.arange(T)[:, None]
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _variant(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None = None, offset: int = 0, causal: bool = True
) -> Tensor:
    """`causal_attention` with one step changed; `offset` moves the mask."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    T, S = scores.shape[2:]
    sees = (torch.arange(S) <= start + offset + torch.arange(T)[:, None]) | (not causal)
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _only_the_first_request(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return causal_attention(q[:1], k[:1], v[:1], start)


def _heads_interleaved(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return causal_attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), start)


def _hides_the_past(q: Tensor, k: Tensor, v: Tensor, start: int, itself: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    T, S = scores.shape[2:]
    sees = torch.arange(S) >= start + torch.arange(T)[:, None] + itself
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _own_heads(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """`causal_attention` for as many KV heads as query heads."""
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    T, S = scores.shape[2:]
    sees = torch.arange(S) <= start + torch.arange(T)[:, None]
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _repeats_by_kv_heads(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    count = k.shape[1]
    return _own_heads(q, k.repeat_interleave(count, dim=1), v.repeat_interleave(count, dim=1), start)


def _repeats_without_dim(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return _own_heads(q, k.repeat_interleave(group), v.repeat_interleave(group), start)


def _qkv(
    heads: int, kv_heads: int, new: int, start: int, dim: int = 8, N: int = 1
) -> tuple[Tensor, Tensor, Tensor, int]:
    g = torch.Generator().manual_seed(heads * 100 + new * 10 + start)
    shapes = ((N, heads, new, dim), (N, kv_heads, start + new, dim), (N, kv_heads, start + new, dim))
    q, k, v = (torch.randn(s, generator=g) for s in shapes)
    return q, k, v, start


CAUSAL_ATTENTION = Exercise(
    name="causal_attention",
    number="01.2",
    difficulty=4,
    reference=causal_attention,
    cases=(
        _qkv(1, 1, 4, 0),
        _qkv(4, 2, 5, 0),
        _qkv(4, 2, 3, 6),
        _qkv(4, 1, 1, 7),
        _qkv(8, 2, 2, 3, dim=4),  # a group of another size than the number of KV heads
        _qkv(4, 2, 3, 2, N=2),
    ),
    wrong=(
        Wrong(_only_the_first_request, "there may be several requests: q has N of them, and so has the result"),
        Wrong(
            lambda q, k, v, start: _variant(q, k, v, start, offset=-start),
            "new token t sits at position start + t: the mask must begin there, not at 0",
        ),
        Wrong(
            lambda q, k, v, start: _variant(q, k, v, start, offset=-1),
            "the mask hides a token from itself; a row that sees nothing becomes NaN: a token sees itself",
        ),
        Wrong(
            lambda q, k, v, start: _variant(q, k, v, start, offset=1),
            "token t sees one token too many: the last one that it sees is itself, at start + t",
        ),
        Wrong(
            lambda q, k, v, start: _variant(q, k, v, start, scale=1.0),
            "divide the scores by the square root of the head dim, q.shape[3]",
        ),
        Wrong(
            lambda q, k, v, start: _variant(q, k, v, start, causal=False),
            "token t must not see what comes after position start + t: mask those scores with -inf",
        ),
        Wrong(
            lambda q, k, v, start: _hides_the_past(q, k, v, start, itself=True),
            "the mask is the wrong way round: in masked_fill, True means hide, and what comes later must be hidden",
        ),
        Wrong(
            lambda q, k, v, start: _hides_the_past(q, k, v, start, itself=False),
            "the mask hides the past: token t sees what comes before it and itself, and nothing later",
        ),
        Wrong(
            lambda q, k, v, start: _variant(q, k, v, start, scale=2**-0.5),
            "the root of 2 fits the example by hand only: the head dim is q.shape[3]",
        ),
        Wrong(
            _repeats_without_dim,
            "repeat_interleave without dim= makes one long row of numbers: name the axis of the heads",
        ),
        Wrong(
            _own_heads,
            "k and v need as many heads as q before the product: repeat their heads, which are axis 1",
        ),
        Wrong(
            _repeats_by_kv_heads,
            "repeat each KV head once for every query head of its group: the group's size is heads // H, not H",
        ),
        Wrong(_heads_interleaved, "neighbouring query heads share a KV head: repeat_interleave, not repeat"),
        Wrong(
            lambda q, k, v, start: causal_attention(q[:, :1], k[:, :1], v[:, :1], start),
            "the result has as many heads as q: give every query head its KV head",
        ),
    ),
    hint="four steps: repeat the KV heads, scaled scores, mask, softmax over the last dim times v",
    forbidden="attention",
    after="The model takes this function as it is. Production kernels read a shared KV head in place, without copies.",
)


# --- going on after a cached prefix -------------------------------------------------------------
def answer_from(
    model: torch.nn.Module,
    tokens: list[int],
    kv: Tensor,
    cached: int,
) -> Tensor:
    """Logits [vocab] after the last token; `kv` has the first `cached` tokens."""
    start = min(cached, len(tokens) - 1)  # the last token is always computed: its logits are the answer
    rest = torch.tensor([tokens[start:]])
    return model(rest, kv, start=start, last_only=True)[0, -1]


class SmallModel:
    """Called as the real model is, but quick: its logits at a position say which tokens the KV has up to there.

    Attributes:
        calls: what it computed: the tokens and their first position.
    """

    VOCAB = 7

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def __repr__(self) -> str:
        return "a small model"

    def __call__(self, tokens: Tensor, kv: Tensor | None = None, start: int = 0, last_only: bool = False) -> Tensor:
        """As `Llama.forward`: tokens [1, T] to logits [1, T, vocab], or [1, 1, vocab] with `last_only`."""
        new = tokens[0].tolist()
        self.calls.append((new, start))
        if kv is None:
            kv = torch.zeros(1, 1, 1, 1, len(new), 1)
        kv[..., start : start + len(new), 0] = tokens.float()
        seen = (kv[0, 0, 0, 0, : start + len(new), 0] * torch.arange(1, start + len(new) + 1)).cumsum(0)
        logits = torch.nn.functional.one_hot(seen.long() % self.VOCAB, self.VOCAB).float()[start:]
        return logits[None, -1:] if last_only else logits[None]


def _computed(result: Any, args: tuple[Any, ...]) -> Any:
    """What the model was asked to compute, and the answer."""
    work = [f"tokens {tokens} from position {start}" for tokens, start in args[0].calls]
    if not isinstance(result, Tensor):
        return work, type(result).__name__
    return work, f"shape {tuple(result.shape)}", f"the highest logit is number {int(result.argmax())}"


def _after_prefix(tokens: list[int], cached: int) -> tuple[SmallModel, list[int], Tensor, int]:
    kv = torch.full((1, 1, 1, 1, len(tokens) + 2, 1), 50.0)  # like the real one, not empty where nothing was written
    kv[..., :cached, 0] = torch.tensor(tokens[:cached])
    return SmallModel(), tokens, kv, cached


def _restarts(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    start = min(cached, len(tokens) - 1)
    return model(torch.tensor([tokens[start:]]), kv, last_only=True)[0, -1]


def _computes_all(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    return model(torch.tensor([tokens]), kv, last_only=True)[0, -1]


def _nothing_left(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    return model(torch.tensor([tokens[cached:]]), kv, start=cached)[0, -1]


def _last_again_at_the_end(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    rest = tokens[cached:] or tokens[-1:]
    return model(torch.tensor([rest]), kv, start=cached)[0, -1]


def _one_more(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    start = max(cached - 1, 0)
    return model(torch.tensor([tokens[start:]]), kv, start=start)[0, -1]


def _only_the_last(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    return model(torch.tensor([tokens[-1:]]), kv, start=len(tokens) - 1)[0, -1]


def _whole_result(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    start = min(cached, len(tokens) - 1)
    return model(torch.tensor([tokens[start:]]), kv, start=start, last_only=True)


def _the_token(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> int:
    return int(answer_from(model, tokens, kv, cached).argmax())


def _the_token_as_a_tensor(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    return answer_from(model, tokens, kv, cached).argmax()


def _first_logits(model: torch.nn.Module, tokens: list[int], kv: Tensor, cached: int) -> Tensor:
    start = min(cached, len(tokens) - 1)
    return model(torch.tensor([tokens[start:]]), kv, start=start)[0, 0]


ANSWER_FROM = Exercise(
    name="answer_from",
    number="01.3",
    difficulty=3,
    reference=answer_from,
    cases=(
        _after_prefix([3, 1, 4, 1, 5], 3),
        _after_prefix([3, 1, 4, 1, 5], 4),
        _after_prefix([2, 6, 5], 0),
        _after_prefix([3, 1, 4, 1], 4),
    ),
    wrong=(
        Wrong(
            _restarts,
            "the first token that you compute is at position `cached`: pass start=, or it overwrites the prefix",
        ),
        Wrong(_computes_all, "the answer is right, but the cached tokens were computed again: pass only the others"),
        Wrong(
            _nothing_left,
            "with everything cached there is nothing left to pass, and a cache holds no logits: compute the last token",
        ),
        Wrong(
            _last_again_at_the_end,
            "the last token of 4 sits at position 3: if you compute it again, its position is not `cached`",
        ),
        Wrong(
            _one_more, "one token more than needed was computed: only with everything cached is the last one due again"
        ),
        Wrong(
            _only_the_last, "the tokens between the cached ones and the last one have no KV yet: compute all of them"
        ),
        Wrong(
            _whole_result, "the logits of the last token are one vector [vocab]: take [0, -1] of what the model returns"
        ),
        Wrong(_the_token, "this is the next token: return the logits that it is chosen from, one score for each token"),
        Wrong(
            _the_token_as_a_tensor,
            "argmax comes later: return the whole vector of logits, not the number of the best token",
        ),
        Wrong(_first_logits, "these logits follow the first computed token; the answer follows the last one"),
    ),
    hint="pass the tokens that are not cached, at least the last one, and tell the model the position of the first",
    observe=_computed,
    after="vLLM has the same rule: at most all tokens but the last of a prompt come from its cache.",
)


# --- the first cache ----------------------------------------------------------------------------
def keep(
    kept: dict[tuple[int, ...], Tensor],
    tokens: list[int],
    kv: Tensor,
    block_tokens: int,
) -> None:
    """Put the KV of each full block of `tokens` into `kept`."""
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = kv[:, :, :, :, end - block_tokens : end]
        kept[tuple(tokens[:end])] = block.clone()


def _what_is_kept(result: Any, args: tuple[Any, ...]) -> Any:
    """The entries, after the buffer was used again for another request."""
    kept, _, kv, _ = args
    kv.fill_(-1)
    entries = [
        (key, tuple(block.shape), block.flatten().tolist())
        if isinstance(block, Tensor)
        else (key, type(block).__name__)
        for key, block in kept.items()
    ]
    return sorted(entries, key=lambda entry: (len(str(entry[0])), str(entry[0])))


def _keep_views(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        kept[tuple(tokens[:end])] = kv[:, :, :, :, end - block_tokens : end]


def _keep_under_own_tokens(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        kept[tuple(tokens[end - block_tokens : end])] = kv[:, :, :, :, end - block_tokens : end].clone()


def _keep_views_under_own_tokens(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        kept[tuple(tokens[end - block_tokens : end])] = kv[:, :, :, :, end - block_tokens : end]


def _keep_in_16_bits(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    keep(kept, tokens, kv.half(), block_tokens)


def _keep_partial(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    for start in range(0, len(tokens), block_tokens):
        end = min(start + block_tokens, len(tokens))
        kept[tuple(tokens[:end])] = kv[:, :, :, :, start:end].clone()


def _keep_misses_the_last(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    for end in range(block_tokens, len(tokens), block_tokens):
        kept[tuple(tokens[:end])] = kv[:, :, :, :, end - block_tokens : end].clone()


def _keep_whole_prefixes(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        kept[tuple(tokens[:end])] = kv[:, :, :, :, :end].clone()


def _keep_in_a_new_dict(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> Kept:
    kept = dict(kept)
    keep(kept, tokens, kv, block_tokens)
    return kept


def _keep_forgets(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    kept.clear()
    keep(kept, tokens, kv, block_tokens)


def _keep_under_a_list(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> None:
    kept[tokens[:block_tokens]] = kv[:, :, :, :, :block_tokens]  # type: ignore[index]


def _numbers(capacity: int) -> Tensor:
    """A buffer [L=1, P=1, N=1, H=1, C, D=1] with 10.1, 11.1, 12.1, … in it: float16 does not have these numbers."""
    return torch.arange(10.1, 10 + capacity).reshape(1, 1, 1, 1, capacity, 1)


KEEP = Exercise(
    name="keep",
    number="01.4",
    difficulty=3,
    reference=keep,
    cases=(
        ({}, [1, 2, 3, 4], _numbers(6), 2),
        ({}, [7, 7, 7, 7], _numbers(6), 2),
        ({}, [1, 2, 3, 4, 5], _numbers(8), 2),
        ({(8, 9): _numbers(2)}, [1, 2, 3], _numbers(4), 2),
        ({}, [1], _numbers(2), 2),
    ),
    wrong=(
        Wrong(
            _keep_views,
            "a slice is a view into the buffer: once another request writes there, what was kept changes too. Copy it",
        ),
        Wrong(
            _keep_under_own_tokens,
            "the same tokens after another beginning have other KV: use all tokens up to the block's end as the key",
        ),
        Wrong(
            _keep_views_under_own_tokens,
            "two things: a slice is only a view, and a block's KV depends on all tokens before it, so its key must too",
        ),
        Wrong(_keep_in_16_bits, "the numbers are not those of `kv`: keep them as they are, in their dtype"),
        Wrong(_keep_partial, "a block that is not full yet will still grow: keep full blocks only"),
        Wrong(
            _keep_misses_the_last, "the last full block is missing: the loop ends too early when no token is left over"
        ),
        Wrong(
            _keep_whole_prefixes,
            "an entry holds the KV of its block alone: with whole prefixes the first block is stored again each time",
        ),
        Wrong(_keep_in_a_new_dict, "the caller's dict has nothing new: put the entries into `kept` itself"),
        Wrong(_keep_forgets, "what was in `kept` before must stay: other requests need it"),
        Wrong(_keep_under_a_list, "a dict's key cannot change, so a list is none: make a tuple of the tokens"),
    ),
    hint="go through the ends of the full blocks; the key is all tokens up to there, the value a copy of one block",
    observe=_what_is_kept,
    after="Engines copy too: the memory that a request computes in is given to the next request.",
)


def load(
    kept: dict[tuple[int, ...], Tensor],
    tokens: list[int],
    kv: Tensor,
    block_tokens: int,
) -> int:
    """Copy kept blocks of `tokens` into `kv`; return how many leading tokens it has."""
    cached = 0
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = kept.get(tuple(tokens[:end]))
        if block is None:
            break
        kv[:, :, :, :, end - block_tokens : end] = block
        cached = end
    return cached


def first_load(
    kept: dict[tuple[int, ...], Tensor],
    tokens: list[int],
    kv: Tensor,
    block_tokens: int,
) -> int:
    """Copy kept blocks of `tokens` into `kv`; return how many leading tokens it has."""
    cached = 0
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = kept.get(tuple(tokens[:end]))
        if block is not None:
            kv[:, :, :, :, end - block_tokens : end] = block
            cached = end
    return cached


def _what_is_loaded(result: Any, args: tuple[Any, ...]) -> Any:
    """The number, and the buffer: behind the last token that counts nothing may be copied."""
    if not isinstance(result, int):
        return result
    return result, args[2].flatten().tolist()


def _load_counts_all(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    cached = 0
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        if tuple(tokens[:end]) in kept:
            kv[:, :, :, :, end - block_tokens : end] = kept[tuple(tokens[:end])]
            cached += block_tokens
    return cached


def _load_last_found(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    return first_load(kept, tokens, kv, block_tokens)


def _load_in_blocks(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    return load(kept, tokens, kv, block_tokens) // block_tokens


def _load_copies_behind_the_gap(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    cached, whole = 0, True
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = kept.get(tuple(tokens[:end]))
        whole = whole and block is not None
        if block is not None:
            kv[:, :, :, :, end - block_tokens : end] = block
        cached = end if whole else cached
    return cached


def _load_stops_after_the_gap(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    cached = 0
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        cached = end
        block = kept.get(tuple(tokens[:end]))
        if block is None:
            break
        kv[:, :, :, :, end - block_tokens : end] = block
    return cached


def _load_without_a_test(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    cached = 0
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        kv[:, :, :, :, end - block_tokens : end] = kept[tuple(tokens[:end])]
        cached = end
    return cached


def _load_misses_the_last(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    return load(kept, tokens[:-1], kv, block_tokens)


def _load_returns_zero_at_a_gap(kept: Kept, tokens: list[int], kv: Tensor, block_tokens: int) -> int:
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        if tuple(tokens[:end]) not in kept:
            return 0
        kv[:, :, :, :, end - block_tokens : end] = kept[tuple(tokens[:end])]
    return len(tokens) // block_tokens * block_tokens


def _store(tokens: list[int], missing: tuple[int, ...] = ()) -> Kept:
    """Blocks of two tokens, as `keep` keeps them, without the ones that end at `missing`."""
    kept: Kept = {}
    keep(kept, tokens, _numbers(len(tokens)), 2)
    return {key: block for key, block in kept.items() if len(key) not in missing}


def _empty(capacity: int) -> Tensor:
    return torch.zeros(1, 1, 1, 1, capacity, 1)


LOAD = Exercise(
    name="load",
    number="01.5",
    difficulty=2,
    reference=load,
    given=first_load,
    cases=(
        (_store([1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6, 7], _empty(8), 2),
        (_store([1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 9, 9], _empty(8), 2),
        (_store([1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6], _empty(6), 2),
        (_store([1, 2, 3, 4, 5, 6], missing=(4,)), [1, 2, 3, 4, 5, 6, 7], _empty(8), 2),
        (_store([1, 2, 3, 4, 5, 6], missing=(2,)), [1, 2, 3, 4, 5, 6], _empty(6), 2),
        ({}, [1, 2, 3], _empty(4), 2),
    ),
    wrong=(
        Wrong(
            _load_last_found,
            "look at a store from which one block in the middle has gone: what is in the hole of `kv` then?",
        ),
        Wrong(
            _load_counts_all, "blocks behind a hole are counted here: nothing after the first missing block may be used"
        ),
        Wrong(
            _load_copies_behind_the_gap,
            "the number is right, but blocks behind the hole are copied too: nobody uses them, so stop there",
        ),
        Wrong(_load_stops_after_the_gap, "the missing block is counted too: `cached` may only grow after a copy"),
        Wrong(
            _load_misses_the_last, "the last full block is missing: the loop ends too early when no token is left over"
        ),
        Wrong(_load_in_blocks, "the number is in tokens, not in blocks"),
        Wrong(_load_without_a_test, "a block that is not there is normal: it ends the prefix and raises nothing"),
        Wrong(
            _load_returns_zero_at_a_gap, "what was copied before the missing block is good: return its length, not 0"
        ),
    ),
    hint="what does it return if the second of three blocks is missing, and what stands in `kv` at that place?",
    observe=_what_is_loaded,
    after="Stores drop blocks when they are full. `DistributedKVCache.load` stops at the first one that is missing.",
)
