"""The free pages of a pool, as runs of neighbours.

A request whose pages are one run is read without a copy, so `take` prefers the pages after those that a
request has, then the smallest run that holds all, and cuts up the longest runs only if none does.
"""

from __future__ import annotations


class Runs:
    """Disjoint runs of free pages; no two of them are neighbours.

    >>> free = Runs(8)
    >>> free.take(3), free.take(2), free.take(1)
    ([0, 1, 2], [3, 4], [5])
    >>> free.put([3, 4])
    >>> free.take(2), free.take(2, after=5)
    ([3, 4], [6, 7])
    """

    def __init__(self, pages: int) -> None:
        self.lengths = {0: pages}  # by first page
        self._firsts = {pages - 1: 0}  # by last page
        self.total = pages

    def take(self, count: int, after: int = -1) -> list[int]:
        """Remove `count` pages and return them. There must be that many.

        Args:
            after: a page whose free neighbours come first, as far as they reach.
        """
        taken: list[int] = []
        first = after + 1 if after >= 0 and after + 1 in self.lengths else None
        while len(taken) < count:
            need = count - len(taken)
            first = self._best(need) if first is None else first
            length = self._remove(first)
            used = min(length, need)
            taken += range(first, first + used)
            if used < length:
                self._add(first + used, length - used)
            first = None
        self.total -= count
        return taken

    def put(self, pages: list[int]) -> None:
        """Add pages, and join them with their free neighbours."""
        for page in pages:
            first, length = page, 1
            if page - 1 in self._firsts:
                first = self._firsts[page - 1]
                length += self._remove(first)
            if page + 1 in self.lengths:
                length += self._remove(page + 1)
            self._add(first, length)
        self.total += len(pages)

    def _best(self, need: int) -> int:
        """The first page of the smallest run that holds `need` pages, else of the longest run."""
        fitting = [(length, first) for first, length in self.lengths.items() if length >= need]
        return min(fitting)[1] if fitting else max(self.lengths, key=lambda first: (self.lengths[first], -first))

    def _add(self, first: int, length: int) -> None:
        self.lengths[first] = length
        self._firsts[first + length - 1] = first

    def _remove(self, first: int) -> int:
        length = self.lengths.pop(first)
        del self._firsts[first + length - 1]
        return length
