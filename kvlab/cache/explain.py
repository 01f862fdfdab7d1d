"""Why blocks of a prompt are not in the store: `cache.explain(tokens)` and `python -m kvlab explain`.

Each block gets a place ("host", "store" or "") and, if it cannot be had, one of the CAUSES:

    below_block   the prompt has no full block
    failed        it could not be read: the store does not answer or refuses, or the record is not valid
    refused       this process offered it, and it was not taken: too large, out of range, breaker, not admitted
    gone          it was stored: this process stored or loaded it, or later blocks of the same prompt are still there
    adapter weights tokenizer dtype precision block_size
                  the prompt is stored further under a namespace that differs in this
    diverged      an earlier request has the same beginning, and other tokens in the first missing block
    salt          nobody else stored under this salt, but others did with the same model under another one
    never_stored  nothing shows that it was ever stored

**What can be known.** Keys prove where a chain leaves the store, and that it goes on in another namespace of the same
salt. A block that was evicted or expired leaves no trace: `gone` needs a witness, and without one the weaker
`never_stored` is said. A block that is missing before later ones was stored or refused by whoever wrote those; unless
this process knows better, `gone` is said. Under another salt no keys can be computed, so `salt` is inferred from the
descriptions (`kvlab.cache.describe`), as is `tokenizer` where another tokenizer gives other tokens. Both are said only
as long as nobody but this process has described the own namespace: once somebody has stored under a wrong salt,
another process reads `never_stored` and a note that other salts are in use. `weights` means weights or config.

**What is not shown.** Text and position of a divergence come from what the caller gave (`against`), or from requests
that this process saved itself in the same namespace; of these only the position is told.

**What it costs.** Two round trips if all is there or the store fails: which blocks are there (as `save` asks, which
counts as a use of them), and a read that checks the first records, up to CHECK_BYTES. At most six if a block is
missing: then also the descriptions (64 small keys), the first block under each other namespace, the prompt under the
most similar ones, and a block of earlier requests. With a salt, about 0.1 s of computing for each salted digest, at
most two. Nothing is written, and no store is scanned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvlab.cache.elsewhere import Finding, View, elsewhere
from kvlab.cache.recent import STORED
from kvlab.stores import Store, WriteBehind
from kvlab.stores.faults import Reason

CAUSES: Final = (
    *("below_block", "diverged", "never_stored", "gone", "precision", "salt", "adapter", "tokenizer", "weights"),
    *("dtype", "block_size", "refused", "failed"),
)
CHECK_BYTES: Final = 16 << 20
WORDS: Final[dict[str, str]] = {
    Reason.AUTH: "the login or a right is refused",
    Reason.BREAKER: "the store failed just before and gets no calls",
    Reason.CHECKSUM: "its record is damaged",
    Reason.CONN: "there is no connection to the store",
    Reason.FORGED: "its record was changed, or sealed with other keys",
    Reason.KEY_ID: "its record has another kind of seal, or a master key that is not here",
    Reason.TIMEOUT: "the deadline passed",
    Reason.VERSION: "its record is of another version of kvlab",
}
_HARMLESS: Final = (Reason.COLLAPSED, Reason.DELETED)


@dataclass(frozen=True)
class Block:
    """One full block: its place ("host", "store" or ""), and the cause if it cannot be had, or ""."""

    index: int
    where: str
    cause: str


@dataclass(frozen=True)
class Explanation:
    """The answer.

    Attributes:
        tokens, block_tokens: T and B. A partial last block is never stored and not listed.
        hit_blocks: the leading blocks that can be had. Later ones cannot be used, stored or not.
        checked_blocks: how many of these were read and found valid.
        cause: that of the first block that cannot be had, or "".
        sentence: the answer for people.
        blocks: all full blocks; if there is none, one with the cause "below_block".
        differs: in what this namespace differs from the one that the cause is about.
        diverged_at: the position of the first token that differs from an earlier request.
        here, there: the text around it in both, if the caller gave both and a way to decode tokens.
        notes: what else was found, and what could not be known.
    """

    tokens: int
    block_tokens: int
    hit_blocks: int
    checked_blocks: int
    cause: str
    sentence: str
    blocks: tuple[Block, ...]
    differs: tuple[str, ...] = ()
    diverged_at: int | None = None
    here: str = ""
    there: str = ""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


def explain(
    view: View,
    tokens: Sequence[int],
    against: Sequence[int] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Explanation:
    """Explain block by block where a prompt is, or why it is not there. See the text of this module.

    Args:
        against: a request that should share its beginning with this one.
        decode: turns tokens into text, to show the place where the two differ.

    Raises:
        InputError: a token is not an integer in 0 … 2**32 - 1.
    """
    keys, B = view.namespace.keys(tokens), view.namespace.block_tokens
    if not keys:
        said = f"the prompt has {len(tokens)} tokens, and only full blocks of {B} are stored"
        return Explanation(len(tokens), B, 0, 0, "below_block", said, (Block(0, "", "below_block"),))
    where = _where(view, keys)
    hits, checked, fault = _verified(view, keys, where)
    notes: list[str] = []
    own = [("", "")] * len(keys) if fault else _own_causes(view, keys, where)
    if fault:
        finding = Finding("failed", f"block {hits} could not be read: {_in_words(fault)}")
    elif hits == len(keys):
        finding = Finding("", f"all {len(keys)} blocks of the prompt are in the cache")
    elif own[hits][0]:
        finding = Finding(own[hits][0], f"block {hits} {own[hits][1]}")
    else:
        finding = elsewhere(view, tokens, hits, against, decode, notes)
    causes = ["" if place else cause or finding.cause for place, (cause, _) in zip(where, own, strict=True)]
    if fault:
        causes[hits] = "failed"
    if later := sum(map(bool, where[hits + 1 :])):
        notes.append(f"{later} later blocks are stored and cannot be used without block {hits}")
    sentence = f"{hits} of {len(keys)} blocks can be had; " * (0 < hits < len(keys)) + finding.sentence
    blocks = tuple(Block(i, place, cause) for i, (place, cause) in enumerate(zip(where, causes, strict=True)))
    sizes = len(tokens), B, hits, checked
    return Explanation(*sizes, finding.cause, sentence, blocks, **finding.extra, notes=tuple(notes))


def _where(view: View, keys: Sequence[bytes]) -> list[str]:
    """Return the place of each block. One round trip."""
    stored = view.store.touch_many(keys)
    return ["host" if view.is_near(key) else "store" * there for key, there in zip(keys, stored, strict=True)]


def _verified(view: View, keys: Sequence[bytes], where: list[str]) -> tuple[int, int, str]:
    """Read the first records. Return how many leading blocks can be had, how many were checked, and a fault or "".

    The first missing block is read too: only a read tells nothing from no answer. One round trip.
    """
    lead = where.index("") if "" in where else len(where)
    stored = [i for i in range(lead) if where[i] == "store"][: max(1, CHECK_BYTES // view.record_bytes)]
    asked = [*stored, *range(lead, len(keys))[:1]]
    rooms = [memoryview(bytearray(view.record_bytes)) for _ in asked]
    reasons: list[str] = []
    values = view.store.get_many([keys[i] for i in asked], rooms, reasons)
    for n, (i, value) in enumerate(zip(asked, values, strict=True)):
        problem = reasons[n] if value is None else view.check(keys[i], value)
        if problem == Reason.ABSENT:
            where[i] = ""  # it may have gone just now
        if problem:
            return i, n, "" if problem == Reason.ABSENT else problem
    return lead, len(stored), ""


def _own_causes(view: View, keys: Sequence[bytes], where: Sequence[str]) -> list[tuple[str, str]]:
    """Return cause and sentence for each missing block that this process or a later block knows of, else ("", "")."""
    drops = _drops(view.store)
    last = max((i for i, place in enumerate(where) if place), default=-1)
    return [("", "") if where[i] else _own_cause(view, key, i < last, drops) for i, key in enumerate(keys)]


def _own_cause(view: View, key: bytes, later: bool, drops: str) -> tuple[str, str]:
    if refusal := view.refusal(key):
        return "refused", refusal
    fate = view.recent.fate(key)
    if fate == STORED and drops and isinstance(view.store, WriteBehind):
        return "refused", f"was queued by this process and is not there; the store dropped writes: {drops}"
    if fate == STORED:
        return "gone", "was in the store, as this process saw, and is not any more: evicted, expired or deleted"
    if fate is not None:
        return "refused", f"was offered by this process and not taken: {fate}{f' ({drops})' if drops else ''}"
    if later:
        return "gone", "is missing although later blocks of this prompt are there: evicted, expired or deleted"
    return "", ""


def _drops(store: Store) -> str:
    """Return the reasons for which a store dropped writes, with their counts."""
    drops = store.stats().drops
    return ", ".join(f"{reason} {n}" for reason, n in sorted(drops.items()) if n and reason not in _HARMLESS)


def _in_words(reason: str) -> str:
    return f"{WORDS[reason]} ({reason})" if reason in WORDS else reason
