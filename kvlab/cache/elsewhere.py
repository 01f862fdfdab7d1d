"""Where else a prompt is: in namespaces that differ in something, or in an earlier request that differs in a token.

The second half of `kvlab.cache.explain`, for a missing block that neither this process nor the later blocks know of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvlab.cache.describe import Description, Listing, listing
from kvlab.cache.recent import Recent
from kvlab.core.keys import Namespace, token_bytes
from kvlab.core.seals import Seal
from kvlab.stores import Store

MEMBERS: Final = {  # what a namespace is made of, and the cause if it differs; of several, the first is the cause
    "adapter": "adapter",
    "weights": "weights",
    "config": "weights",
    "tokenizer": "tokenizer",
    "dtype": "dtype",
    "precision": "precision",
    "block_tokens": "block_size",
}
MAX_OTHERS: Final = 4  # namespaces in which the whole prompt is looked for
MAX_BLOCK_TOKENS: Final = 1 << 20
MIN_COMMON: Final = 8  # tokens; a shorter common beginning, such as a begin-of-text token, says nothing
AROUND: Final = 8  # tokens of text to show on each side of a divergence
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class View:
    """What is to be known of a cache.

    Attributes:
        store, namespace: where its blocks are, and under which keys.
        check: returns why the value under a key is not a valid record, or "".
        record_bytes: the size of a buffer for a record.
        description: of the namespace, without its tenant; None if the origin of the fingerprint is not known.
        seal: of descriptions.
        recent: the memory of this process.
        founded: whether this process was the first one to describe the namespace.
        is_near: whether a block is in host memory.
        refusal: returns why a block was not admitted to the store, or "".
    """

    store: Store
    namespace: Namespace
    check: Callable[[bytes, bytes | memoryview], str]
    record_bytes: int
    description: Description | None
    seal: Seal
    recent: Recent
    founded: bool = False
    is_near: Callable[[bytes], bool] = lambda key: False
    refusal: Callable[[bytes], str] = lambda key: ""


@dataclass(frozen=True)
class Finding:
    """Why a block is missing: the cause, the sentence, and further fields of an `Explanation`."""

    cause: str
    sentence: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Other:
    """A namespace of kvlab's own blocks, and in what it differs from the own one."""

    differs: tuple[str, ...]
    description: Description


def elsewhere(
    view: View, tokens: Sequence[int], hits: int, against: Sequence[int] | None, decode: Decode | None, notes: list[str]
) -> Finding:
    """Explain why block `hits` is missing, the first one. At most four round trips. Adds to the notes.

    Raises:
        InputError: a token of `against` is not an integer in 0 … 2**32 - 1.
    """
    found = listing(view.store, view.seal)
    notes += _notes(found, view.description)
    others = _others(view.description, found)
    given = None if against is None else [*memoryview(token_bytes(against)).cast("I")]
    return (
        _proven(view, tokens, hits, others)
        or _diverged(view, tokens, hits, given, decode, notes)
        or (None if hits else _inferred(view, others, notes))
        or Finding("never_stored", f"nothing shows that block {hits} was ever stored; an eviction leaves no trace")
    )


# --- other namespaces -------------------------------------------------------------------------------------------------
def _notes(found: Listing, own: Description | None) -> list[str]:
    notes = []
    if found.fault:
        notes.append(f"the descriptions of namespaces could not be read: {found.fault}")
    elif not found.found:
        notes.append(
            "the store has no description of a namespace that can be read here: nobody has saved yet, or it expired; "
            "what is stored with other precisions, models or salts cannot be told"
        )
    if found.other_formats:
        notes.append(
            f"{found.other_formats} descriptions are of another version of kvlab and cannot be read by this one"
        )
    if found.unreadable:
        notes.append(f"{found.unreadable} places for descriptions hold something else: damaged, or sealed otherwise")
    if own is None:
        notes.append("this cache does not know of what its fingerprint is made, so it compares no namespaces")
    return notes


def _others(own: Description | None, found: Listing) -> list[_Other]:
    """Return the other namespaces, the most similar ones first. Blocks in the layout of an engine are never shared."""
    candidates = [one for one in found.found if not one.layout] if own is not None else []
    return sorted((_Other(_differs(own, one), one) for one in candidates), key=lambda other: len(other.differs))


def _differs(own: Description | None, other: Description) -> tuple[str, ...]:
    names = [name for name in MEMBERS if getattr(own, name) != getattr(other, name)]
    if getattr(own, "fingerprint", "") != other.fingerprint and not {*names} - {"precision", "block_tokens"}:
        names.insert(0, "config")  # something that the description does not name
    return tuple(dict.fromkeys(MEMBERS[name] for name in names))


def _proven(view: View, tokens: Sequence[int], hits: int, others: Sequence[_Other]) -> Finding | None:
    """Look for the prompt under the keys of other namespaces, with the own salt. At most two round trips."""
    firsts = [(other, _keys(view, other.description, tokens[: other.description.block_tokens])) for other in others]
    firsts = [(other, first) for other, first in firsts if other.differs and first]
    there = view.store.touch_many([first[0] for _, first in firsts]) if firsts else []
    found = [other for (other, _), stored in zip(firsts, there, strict=True) if stored][:MAX_OTHERS]
    near = [(other, _keys(view, other.description, tokens)) for other in found]
    present = iter(view.store.touch_many([key for _, chain in near for key in chain]) if near else [])
    best, most = None, hits * view.namespace.block_tokens
    for other, chain in near:
        run = [next(present) for _ in chain]
        reach = (run.index(False) if False in run else len(run)) * other.description.block_tokens
        if reach > most:
            best, most = other, reach
    if best is None:
        return None
    who, what = (
        best.description,
        " and ".join(_in_words(view.description, best.description, name) for name in best.differs),
    )
    said = f"{most} tokens of the prompt are stored by {who.engine} ({who.model}) with {what}"
    return Finding(best.differs[0], said, {"differs": best.differs})


def _keys(view: View, other: Description, tokens: Sequence[int]) -> list[bytes]:
    """Return the keys of the prompt in another namespace, none if the description cannot be true."""
    try:
        fingerprint = bytes.fromhex(other.fingerprint)
    except ValueError:
        return []
    if not 0 < other.block_tokens <= MAX_BLOCK_TOKENS:
        return []
    return Namespace(fingerprint, other.precision, view.namespace.salt, other.block_tokens).keys(tokens)


def _in_words(own: Description | None, other: Description, cause: str) -> str:
    name = "block_tokens" if cause == "block_size" else cause
    if name not in ("dtype", "precision", "block_tokens"):
        return f"other {cause}" if cause == "weights" else f"another {cause}"
    return f"another {cause} ({getattr(other, name)}, here {getattr(own, name)})"


def _inferred(view: View, others: Sequence[_Other], notes: list[str]) -> Finding | None:
    """Blame salt or tokenizer if nobody else uses this namespace, but somebody the same one but for that."""
    if view.description is None:
        return None
    salt = view.namespace.salt
    tenants = {other.description.tenant for other in others if not other.differs}
    mine = view.description.of_tenant(salt).tenant if tenants else ""
    strangers = len(tenants - {mine})
    salts = f"the same model is in use under {strangers} other salt{'s' * (strangers != 1)}"
    if mine in tenants and not view.founded:
        notes += [f"{salts}; what is stored there cannot be looked at"] if strangers else []
        return None
    if strangers:
        said = f"nobody else has stored under this salt, but {salts}: if they should share, give all the same one"
        return Finding("salt", said, {"differs": ("salt",)})
    for who in [other.description for other in others if other.differs == ("tokenizer",)][:1]:
        if who.of_tenant(salt).tenant == who.tenant:
            said = f"nobody else has stored with this tokenizer, but {who.engine} ({who.model}) has with another one"
            return Finding("tokenizer", f"{said}, which may give other tokens", {"differs": ("tokenizer",)})
    return None


# --- an earlier request -----------------------------------------------------------------------------------------------
def _diverged(
    view: View, tokens: Sequence[int], hits: int, against: list[int] | None, decode: Decode | None, notes: list[str]
) -> Finding | None:
    """Look for a stored request whose tokens leave the prompt within the first missing block. One round trip."""
    B = view.namespace.block_tokens
    ours = [request for request in view.recent.requests() if common(tokens, request) >= min(B, MIN_COMMON)]
    requests = [r for r in (against, *ours) if r is not None and _leaves_in(tokens, r, hits, B)]
    chains = [view.namespace.keys(request[: (hits + 1) * B]) for request in requests]
    stored = view.store.touch_many([chain[hits] for chain in chains]) if chains else []
    found = [request for request, there in zip(requests, stored, strict=True) if there]
    if against is not None and found[:1] != [against]:
        notes.append(_of_against(tokens, against, hits, B))
    if not found:
        return None
    if found[0] is not against:
        at = max(common(tokens, request) for request in found)
        said = f"token {at}, in block {hits}, is not that of a request that this process saved"
        return Finding("diverged", said, {"diverged_at": at})
    at = common(tokens, against)
    told: dict[str, Any] = {"diverged_at": at}
    if decode is not None:
        nearby = slice(max(0, at - AROUND), at + AROUND)
        told |= {"here": decode(tokens[nearby]), "there": decode(against[nearby])}
    return Finding("diverged", f"token {at}, in block {hits}, is not that of the other prompt, which is stored", told)


def _leaves_in(tokens: Sequence[int], request: Sequence[int], block: int, B: int) -> bool:
    """Whether a request has the tokens of the prompt up to somewhere in a block, and others from there on."""
    return block * B <= common(tokens, request) < (block + 1) * B <= len(request)


def _of_against(tokens: Sequence[int], against: Sequence[int], hits: int, B: int) -> str:
    """Return why a given request does not explain the first missing block."""
    at = common(tokens, against)
    if _leaves_in(tokens, against, hits, B):
        return f"the two prompts differ from token {at} on, but the other one is not stored either"
    if at == min(len(tokens), len(against)):
        return f"the two prompts have the same tokens as far as the shorter one goes, {at} tokens"
    return f"the two prompts differ from token {at} on, which is not why block {hits} is missing"


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common beginning.

    >>> common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
