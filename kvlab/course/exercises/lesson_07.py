"""The exercises of notebook 07, sharding: ring, weighted rendezvous, hash tags, replies in order."""

from __future__ import annotations

import bisect
import math
import re

from kvlab.course.exercises.engine import Exercise, Wrong


def ring_owner(points: list[int], owners: list[str], at: int) -> str:
    """The node of a key at `at`: the owner of the first point at or after it; after the last point comes the first."""
    return owners[bisect.bisect_left(points, at) % len(points)]


def _point_before(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_right(points, at) - 1]


def _one_step_short(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_left(points, at) - 1]


def _place_itself(points: list[int], owners: list[str], at: int) -> int:
    return bisect.bisect_left(points, at) % len(points)


def _point_itself(points: list[int], owners: list[str], at: int) -> int:
    return points[bisect.bisect_left(points, at) % len(points)]


def _no_way_around(points: list[int], owners: list[str], at: int) -> str:
    return owners[min(bisect.bisect_left(points, at), len(points) - 1)]


def _falls_off_the_end(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_left(points, at)]


def _nearest_point(points: list[int], owners: list[str], at: int) -> str:
    return owners[min(range(len(points)), key=lambda i: abs(points[i] - at))]


def _strictly_after(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_right(points, at) % len(points)]


RING_OWNER = Exercise(
    name="ring_owner",
    number="07.1",
    difficulty=2,
    reference=ring_owner,
    cases=(
        ([10, 40, 70], ["B", "A", "B"], 25),
        ([10, 40, 70], ["B", "A", "C"], 95),
        ([10, 40, 70], ["B", "A", "C"], 40),
        ([10, 40, 70], ["B", "A", "C"], 3),
        ([5], ["A"], 6),
    ),
    wrong=(
        Wrong(_point_before, "a key goes clockwise: to the next point at or after it, not to the one before"),
        Wrong(_one_step_short, "bisect_left already gives the first point at or after the key: do not go one back"),
        Wrong(_place_itself, "that is the place in the lists: return the owner that stands there, owners[…]"),
        Wrong(_point_itself, "that is the point: return its owner, the name at the same place in `owners`"),
        Wrong(_no_way_around, "after the last point the ring begins anew: the first point has those keys"),
        Wrong(_falls_off_the_end, "beyond the last point comes the first again: take the index % len(points)"),
        Wrong(_nearest_point, "not the nearest point: the next one, however far it is"),
        Wrong(_strictly_after, "a key exactly on a point is that point's: bisect_left, not bisect"),
    ),
    hint="find the first point that is >= at; if there is none, take the first of all",
)


def weighted_owner(draws: dict[str, float], weights: dict[str, float]) -> str:
    """The node with the highest score -weight / ln(draw); `draws` has each node's number for this key, in (0, 1)."""
    return max(draws, key=lambda node: -weights[node] / math.log(draws[node]))


def _draw_times_weight(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: draws[node] * weights[node])


def _sign_lost(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: weights[node] / math.log(draws[node]))


def _weights_unused(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: draws[node])


def _times_the_logarithm(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: -weights[node] * math.log(draws[node]))


def _score_itself(draws: dict[str, float], weights: dict[str, float]) -> float:
    return max(-weights[node] / math.log(draws[node]) for node in draws)


def _heaviest(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(weights, key=lambda node: weights[node])


WEIGHTED_OWNER = Exercise(
    name="weighted_owner",
    number="07.2",
    difficulty=3,
    reference=weighted_owner,
    cases=(
        ({"A": 0.9, "B": 0.5}, {"A": 1, "B": 3}),
        ({"A": 0.9, "B": 0.85}, {"A": 1, "B": 3}),
        ({"A": 0.4, "B": 0.2, "C": 0.6}, {"A": 1, "B": 1, "C": 1}),
        ({"A": 0.7, "B": 0.1, "C": 0.65}, {"A": 1, "B": 8, "C": 2}),
    ),
    wrong=(
        Wrong(_draw_times_weight, "draw x weight gives no fair shares: a node of weight 3 must win 3 of 4 against 1"),
        Wrong(_sign_lost, "ln of a number below 1 is negative: without the minus the lowest score wins"),
        Wrong(_times_the_logarithm, "divide -weight by ln(draw), do not multiply: a draw close to 1 must score high"),
        Wrong(_score_itself, "that is the highest score; return the name of the node that has it: max(draws, key=…)"),
        Wrong(_weights_unused, "a node with twice the memory should win twice as often: use `weights`"),
        Wrong(_heaviest, "the heaviest node must not get every key: the draws decide, the weights only lean on them"),
    ),
    hint="the score of a node is -weights[node] / math.log(draws[node]); take the node with the highest",
)


def hash_tag(key: bytes) -> bytes:
    """The part of a key that its slot is computed from: what stands in its first {…}, else the whole key."""
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _to_the_last_brace(key: bytes) -> bytes:
    begin, end = key.find(b"{"), key.rfind(b"}")
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _empty_tag(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end else key


def _braces_kept(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin : end + 1] if -1 < begin < end - 1 else key


def _any_first_pair(key: bytes) -> bytes:
    found = re.search(rb"\{(.*?)\}", key)
    return found[1] if found else key


def _first_closing_brace(key: bytes) -> bytes:
    begin, end = key.find(b"{"), key.find(b"}")
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _last_opening_brace(key: bytes) -> bytes:
    begin = key.rfind(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _one_byte_or_more(key: bytes) -> bytes:
    found = re.search(rb"\{(.+?)\}", key)
    return found[1] if found else key


def _next_pair(key: bytes) -> bytes:
    found = re.search(rb"\{([^}]+)\}", key, re.DOTALL)
    return found[1] if found else key


HASH_TAG = Exercise(
    name="hash_tag",
    number="07.3",
    difficulty=3,
    reference=hash_tag,
    cases=(
        (b"{user1000}.following",),
        (b"no tag",),
        (b"foo{}{bar}",),
        (b"foo{{bar}}zap",),
        (b"foo{bar}{zap}",),
        (b"a}b{c}d",),
        (b"{never closed",),
        (b"kv:\x00{\xff\n}\x01",),
    ),
    wrong=(
        Wrong(_to_the_last_brace, "the tag ends at the FIRST } after the {, even if more follow"),
        Wrong(_empty_tag, "with nothing between { and } the whole key counts, or all such keys would share one slot"),
        Wrong(_any_first_pair, "for an empty {} return the whole key; and `.` in a pattern does not match a newline"),
        Wrong(_braces_kept, "what counts stands between the braces: return it without them"),
        Wrong(_first_closing_brace, "a } before the { means nothing: look for one behind it"),
        Wrong(_last_opening_brace, "the tag begins at the FIRST {: in foo{{bar}}zap it is {bar"),
        Wrong(_one_byte_or_more, "`.+?` wants a byte, so in {}{bar} it takes the }: an empty first pair means no tag"),
        Wrong(_next_pair, "after an empty {} no other pair is looked for: then the whole key counts"),
    ),
    hint="the first {, then the first } behind it; if either is missing or nothing stands between, the whole key",
)


def in_order(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    """The replies in the order of the keys; `owners` has each key's node. None for keys of a node without replies."""
    queues = {node: iter(answers) for node, answers in replies.items()}
    return [next(queues[node]) if node in queues else None for node in owners]


def _node_after_node(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return [answer for answers in replies.values() for answer in answers]


def _silent_node_skipped(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return in_order([node for node in owners if node in replies], replies)


def _counted_in_the_batch(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return [replies[node][i] if node in replies else None for i, node in enumerate(owners)]


def _silent_node_looked_up(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    queues = {node: iter(answers) for node, answers in replies.items()}
    return [next(queues[node]) for node in owners]


def _one_reply_for_all(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return [replies[node][0] if node in replies else None for node in owners]


def _from_the_back(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return in_order(owners, {node: answers[::-1] for node, answers in replies.items()})


IN_ORDER = Exercise(
    name="in_order",
    number="07.4",
    difficulty=3,
    reference=in_order,
    cases=(
        (["A", "A"], {"A": [b"0", b"1"]}),
        (["A", "B", "A", "C"], {"A": [b"0", b"2"], "B": [b"1"], "C": [b"3"]}),
        (["C", "A", "C", "A"], {"A": [b"1", None], "C": [b"0", b"2"]}),
        (["A", "B", "A", "B"], {"A": [b"0", b"2"]}),
        ([], {}),
    ),
    wrong=(
        Wrong(_node_after_node, "these are the replies node after node: block 2 would stand at the place of block 1"),
        Wrong(_silent_node_skipped, "a node that did not answer leaves gaps: put None there, or later ones move up"),
        Wrong(_counted_in_the_batch, "i is the key's place in the batch; a node's replies count only its own keys"),
        Wrong(_silent_node_looked_up, "a node that did not answer is not in `replies`: ask first whether it is"),
        Wrong(_one_reply_for_all, "each reply is for one key: the second key of a node gets its second reply"),
        Wrong(_from_the_back, "a node answers in the order in which it was asked: take its replies from the front"),
    ),
    hint="walk through `owners`; take the next reply of that node, or None if the node sent none",
)
