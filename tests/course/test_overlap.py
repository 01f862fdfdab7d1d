"""Overlap of requests: the radix tree and the search for near-duplicates against their definitions."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.course.overlap import Node, RadixTree, common_prefix, near_duplicates

request_lists = st.lists(st.lists(st.integers(0, 2), max_size=8).map(tuple), max_size=12)
some_tokens = st.lists(st.integers(0, 2), max_size=10).map(tuple)
Tokens = tuple[int, ...]


def shared2(a: Tokens, b: Tokens) -> int:
    """The longest prefix of both, tried from the longest down."""
    return next(n for n in range(min(len(a), len(b)), -1, -1) if a[:n] == b[:n])


def prefixes(requests: list[Tokens]) -> set[Tokens]:
    """Every prefix of at least one token that some request has."""
    return {r[:n] for r in requests for n in range(1, len(r) + 1)}


def paths(tree: RadixTree) -> list[tuple[Tokens, Node]]:
    """Each node with all tokens from the root to its end, by following the children."""
    found, todo = [], [((), child) for child in tree.root.children.values()]
    while todo:
        before, node = todo.pop()
        path = (*before, *node.tokens)
        found.append((path, node))
        todo += [(path, child) for child in node.children.values()]
    return found


# --- the tree ---------------------------------------------------------------------------------------
@given(request_lists)
def test_insert_tells_how_much_the_most_similar_earlier_request_had(requests: list[Tokens]) -> None:
    tree = RadixTree()
    for i, request in enumerate(requests):
        best = max((shared2(request, earlier) for earlier in requests[:i]), default=0)
        assert tree.insert(request) == best


@given(request_lists)
def test_the_tree_holds_each_distinct_prefix_once(requests: list[Tokens]) -> None:
    tree = RadixTree(requests)
    assert tree.tokens == sum(map(len, requests))
    assert tree.unique == len(prefixes(requests)) == sum(len(node.tokens) for _, node in tree.walk())
    assert tree.shared == (1 - tree.unique / tree.tokens if tree.tokens else 0.0)
    assert 0 <= tree.shared < 1


@given(request_lists, some_tokens)
def test_match_finds_the_longest_prefix_that_any_request_has(requests: list[Tokens], tokens: Tokens) -> None:
    tree = RadixTree(requests)
    for asked in (tokens, *requests, *[(*r, 0) for r in requests]):
        assert tree.match(asked) == max((shared2(asked, r) for r in requests), default=0)


@given(request_lists)
def test_every_node_counts_the_requests_that_pass_through_it(requests: list[Tokens]) -> None:
    tree = RadixTree(requests)
    assert tree.root.requests == len(requests)
    for path, node in paths(tree):
        passing = [r for r in requests if r[: len(path)] == path]
        assert node.requests == len(passing) >= 1
        first = len(path) - len(node.tokens) + 1
        assert all(sum(r[:n] == path[:n] for r in requests) == node.requests for n in range(first, len(path)))


@given(request_lists)
def test_edges_are_not_empty_and_children_lie_under_their_first_token(requests: list[Tokens]) -> None:
    tree = RadixTree(requests)
    for _, node in tree.walk():
        assert node.tokens
    for node in (tree.root, *(node for _, node in tree.walk())):
        assert all(child.tokens[0] == first for first, child in node.children.items())
    ends = {path for path, _ in paths(tree)}
    assert {r for r in requests if r} <= ends
    # a node with one child is there only because a request ends with it
    assert all(len(node.children) != 1 or path in requests for path, node in paths(tree))


@given(request_lists)
def test_walk_gives_each_node_once_after_its_parent_with_the_tokens_before_it(requests: list[Tokens]) -> None:
    tree = RadixTree(requests)
    depths = {id(node): len(path) - len(node.tokens) for path, node in paths(tree)}
    seen: set[int] = {id(tree.root)}
    parents = {id(child): id(n) for n in (tree.root, *(n for _, n in tree.walk())) for child in n.children.values()}
    for depth, node in tree.walk():
        assert depth == depths[id(node)]
        assert id(node) not in seen and parents[id(node)] in seen
        seen.add(id(node))
    assert len(seen) == len(depths) + 1


@given(request_lists, st.randoms(use_true_random=False))
def test_the_order_of_requests_changes_no_count(requests: list[Tokens], random: Random) -> None:
    mixed = list(requests)
    random.shuffle(mixed)
    a, b = RadixTree(requests), RadixTree(mixed)
    assert (a.tokens, a.unique) == (b.tokens, b.unique)
    assert sorted((p, n.requests) for p, n in paths(a)) == sorted((p, n.requests) for p, n in paths(b))


@given(request_lists, some_tokens)
def test_match_changes_nothing(requests: list[Tokens], tokens: Tokens) -> None:
    tree = RadixTree(requests)
    before = sorted((p, n.requests) for p, n in paths(tree))
    tree.match(tokens)
    assert sorted((p, n.requests) for p, n in paths(tree)) == before
    assert (tree.tokens, tree.unique, tree.root.requests) == (
        sum(map(len, requests)),
        len(prefixes(requests)),
        len(requests),
    )


def test_the_callers_list_is_not_kept() -> None:
    tokens = [1, 2, 3]
    tree = RadixTree([tokens])
    tokens[1] = 9
    assert tree.match([1, 2, 3]) == 3


def test_an_empty_tree_has_nothing() -> None:
    for tree in (RadixTree(), RadixTree([])):
        assert (tree.tokens, tree.unique, tree.shared, list(tree.walk())) == (0, 0, 0.0, [])
        assert tree.match([1, 2]) == tree.match([]) == 0


def test_empty_requests_are_counted_but_hold_nothing() -> None:
    tree = RadixTree([[], []])
    assert tree.insert([]) == 0
    assert (tree.root.requests, tree.tokens, tree.shared, list(tree.walk())) == (3, 0, 0.0, [])


@given(some_tokens, some_tokens)
def test_common_prefix_is_the_longest_of_both(a: Tokens, b: Tokens) -> None:
    assert common_prefix(a, b) == common_prefix(list(b), list(a)) == shared2(a, b)


# --- near-duplicates --------------------------------------------------------------------------------
def near_duplicates2(requests: list[Tokens], threshold: float, n: int) -> list[tuple[int, int, float]]:
    """All pairs that have something in common, by the Jaccard index of their sets of n tokens in a row."""
    sets = [{r[i : i + n] for i in range(len(r)) if len(r[i : i + n]) == n} for r in requests]
    pairs = [(i, j, len(sets[i] & sets[j]), len(sets[i] | sets[j])) for i, j in combinations(range(len(sets)), 2)]
    near = [(i, j, both / either) for i, j, both, either in pairs if both and both / either >= threshold]
    return sorted(near, key=lambda pair: (-pair[2], pair[0], pair[1]))


@given(request_lists, st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.75, 1.0, 1.1]), st.integers(1, 5))
def test_near_duplicates_are_all_pairs_by_their_jaccard_index(requests: list[Tokens], threshold: float, n: int) -> None:
    assert near_duplicates(requests, threshold, n) == near_duplicates2(requests, threshold, n)
    assert near_duplicates([list(r) for r in requests], threshold, n) == near_duplicates2(requests, threshold, n)


@given(request_lists)
def test_the_defaults_are_half_and_four_tokens(requests: list[Tokens]) -> None:
    assert near_duplicates(requests) == near_duplicates2(requests, 0.5, 4)


def test_equal_requests_are_near_and_what_stands_before_does_not_matter() -> None:
    assert near_duplicates([[1, 2, 3, 4]] * 3) == [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)]
    text = list(range(100))
    assert near_duplicates([text, [7, *text]], n=4) == [(0, 1, 97 / 98)]


@pytest.mark.parametrize(
    "requests", [[], [[]], [[], []], [[1, 2, 3]] * 2, [[1, 2, 3, 4]], [[1, 2, 3, 4], [5, 6, 7, 8]]]
)
def test_requests_without_common_runs_are_no_pairs(requests: list[list[int]]) -> None:
    assert near_duplicates(requests, threshold=0.0) == []
