"""Overlap of many requests: a radix tree of their tokens, and pairs of similar requests.

Both are for analysis only. They show how much a prefix cache could save and which prompts need
another layout. A cache never uses the KV of a similar request, because this KV was computed from
other tokens. Notebook 03 measures the damage of such KV.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations


@dataclass
class Node:
    """One edge of the tree and the subtree below it.

    Attributes:
        tokens: the tokens on the edge from the parent to this node.
        requests: number of requests that contain this edge.
        children: child nodes by their first token.
    """

    tokens: list[int]
    requests: int = 0
    children: dict[int, Node] = field(default_factory=dict)


class RadixTree:
    """A radix tree of requests: a common prefix is stored once. The granularity is a single token.

    >>> tree = RadixTree([[1, 2, 3, 4], [1, 2, 3, 9], [7, 8]])
    >>> tree.tokens, tree.unique, f"{tree.shared:.0%}"
    (10, 7, '30%')
    """

    def __init__(self, requests: Iterable[Sequence[int]] = ()) -> None:
        self.root = Node([])
        self.tokens = 0
        self.unique = 0
        for request in requests:
            self.insert(request)

    @property
    def shared(self) -> float:
        """Share of all tokens that are part of a prefix of an earlier request; 0 for an empty tree."""
        return 1 - self.unique / self.tokens if self.tokens else 0.0

    def insert(self, tokens: Sequence[int]) -> int:
        """Add a request; return how many of its leading tokens the tree already contained."""
        node, done = self.root, 0
        node.requests += 1
        while done < len(tokens):
            found = node.children.get(tokens[done])
            if found is None:
                node.children[tokens[done]] = Node(list(tokens[done:]), 1)
                break
            same = common_prefix(found.tokens, tokens[done:])
            if same < len(found.tokens):
                found = self._split(node, found, same)
            found.requests += 1
            node, done = found, done + same
        self.tokens += len(tokens)
        self.unique += len(tokens) - done
        return done

    def match(self, tokens: Sequence[int]) -> int:
        """Length of the longest prefix of `tokens` that is also a prefix of a request."""
        node, done = self.root, 0
        while done < len(tokens) and (found := node.children.get(tokens[done])):
            same = common_prefix(found.tokens, tokens[done:])
            done += same
            if same < len(found.tokens):
                break
            node = found
        return done

    def walk(self) -> Iterator[tuple[int, Node]]:
        """All nodes below the root, parents before children, each with the number of tokens before the node."""
        stack = [(0, child) for child in reversed(self.root.children.values())]
        while stack:
            depth, node = stack.pop()
            yield depth, node
            stack += [(depth + len(node.tokens), child) for child in reversed(node.children.values())]

    @staticmethod
    def _split(parent: Node, node: Node, at: int) -> Node:
        """Insert a node for the first `at` tokens of `node` between `parent` and `node`; return the new node."""
        upper = Node(node.tokens[:at], node.requests, {node.tokens[at]: node})
        parent.children[node.tokens[0]] = upper
        node.tokens = node.tokens[at:]
        return upper


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two requests share."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def near_duplicates(
    requests: Sequence[Sequence[int]], threshold: float = 0.5, n: int = 4
) -> list[tuple[int, int, float]]:
    """Pairs of requests with similar content at any position, most similar first.

    The similarity is the Jaccard index of the sets of `n` consecutive tokens ("shingles", Broder
    1997). The result is exact. The time grows with the number of pairs that share a shingle, which
    is practical for thousands of requests. Pairs without a common shingle are not returned.

    >>> near_duplicates([[1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [6, 7, 8, 9, 6]], n=2)
    [(0, 1, 0.8)]
    """
    shingles = [{tuple(r[i : i + n]) for i in range(len(r) - n + 1)} for r in requests]
    holders: dict[tuple[int, ...], list[int]] = {}
    for i, own in enumerate(shingles):
        for shingle in own:
            holders.setdefault(shingle, []).append(i)
    common = Counter(pair for who in holders.values() for pair in combinations(who, 2))
    scored = ((i, j, both / (len(shingles[i]) + len(shingles[j]) - both)) for (i, j), both in common.items())
    return sorted((s for s in scored if s[2] >= threshold), key=lambda s: (-s[2], s[:2]))
