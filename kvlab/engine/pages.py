"""The device tier: KV in pages of 16 tokens, and block tables that say which pages a request uses.

A request owns a `BlockTable`, a list of page numbers, and a page may be in several tables. Requests with
the same prefix share its pages without a copy, and memory is given out 16 tokens at a time, not for the
longest answer that may come. Source: Kwon et al., 2023 (PagedAttention).

    pool         [L, P, H, pages, 16, D]     axes as in `kvlab.model.llama`
    block table  [7, 8, 9, 3]                tokens 0 … 15 are in page 7, tokens 16 … 31 in page 8, …

Neighbouring pages form a run (`runs`). The KV of a run is a view of the pool, and attention reads it in
place. The KV of scattered pages is gathered first, which copies it.

A new table shares the pages of the longest prefix that the index (`prefixes`) has; a partly filled page is in no
block. Blocks of requests that have ended stay in the index until their pages are needed.

A pool is not thread-safe: its engine calls it from one thread, or holds a lock.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from kvlab.core.keys import Namespace
from kvlab.engine.prefixes import Block, PrefixIndex
from kvlab.engine.runs import Runs
from kvlab.errors import ConfigError, InputError, KVLabError
from kvlab.model import Llama

PAGE_TOKENS: Final = 16


class PoolExhausted(KVLabError):
    """A request needs more pages than are free or can be evicted. It may wait and try again."""


@dataclass(eq=False)
class BlockTable:
    """The pages of one sequence. A `Llama` takes it as `kv`, in place of the tensor of `Llama.new_kv`.

    It is a context manager that gives the pages back on exit.

    Attributes:
        pages: page numbers, in the order of the tokens. Only the pool changes them.
        keys: the keys of the leading blocks that it holds in the prefix index.
    """

    pool: PagePool
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    closed: bool = False

    @property
    def capacity(self) -> int:
        """The number of tokens that the pages hold."""
        return len(self.pages) * self.pool.page_tokens

    @property
    def is_run(self) -> bool:
        """Whether the pages are neighbours, so that reading copies nothing."""
        return not self.pages or self.pages == list(range(self.pages[0], self.pages[0] + len(self.pages)))

    def __getitem__(self, layer: int) -> LayerPages:
        return LayerPages(self, layer)

    def read(self, stop: int) -> Tensor:
        """Return the KV of the tokens before `stop`, [L, P, H, stop, D]: a view if the pages are a run, else a copy."""
        return self.pool.read(self.pool.data, self, stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.closed:
            self.pool.close(self)


@dataclass(frozen=True)
class LayerPages:
    """One layer of a block table."""

    table: BlockTable
    layer: int

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write the KV of T new tokens from position `start` on, and return the KV of all tokens so far.

        Args:
            k, v: [1, H, T, D].

        Returns:
            Keys and values [1, H, start + T, D]: views of the pool, or copies.
        """
        pool = self.table.pool
        data = pool.data[self.layer]
        pool.make_writable(self.table, start, start + k.shape[2])
        pool.write(data, self.table, torch.stack((k[0], v[0])), start)
        both = pool.read(data, self.table, start + k.shape[2])
        return both[0][None], both[1][None]


class PagePool:
    """Pages of KV, the tables that use them, and the prefix index.

    Args:
        model: the model whose KV the pages hold. The pool is on its device and has its dtype.
        pages: the number of pages.
        namespace: the family of keys of the prefix index; its block size is a multiple of `page_tokens`. Without
            one, nothing is remembered after a table is closed.
        page_tokens: tokens in a page.
        policy: the eviction policy, a name in `kvlab.core.policies.POLICIES`.
        prefix_caching: False to remember nothing even with a namespace.

    Attributes:
        data: [L, P, H, pages, page_tokens, D].
        refs: for each page the number of tables that have it, plus 1 if it is in the index.
        owner: the scheduler that the pool belongs to, if there is one.
        counts: blocks looked for ("requested") and found ("hits"), and pages copied on a write ("copied").

    Raises:
        ConfigError: a size is not a whole number of at least 1, a block is not made of whole pages, or the
            policy is unknown.
    """

    def __init__(
        self,
        model: Llama,
        pages: int,
        namespace: Namespace | None = None,
        page_tokens: int = PAGE_TOKENS,
        policy: str = "lru",
        prefix_caching: bool = True,
    ) -> None:
        for name, size in (("pages", pages), ("page_tokens", page_tokens)):
            if type(size) is not int or size < 1:
                raise ConfigError(f"expected {name} as a whole number of at least 1, got {size!r}")
        if namespace is not None and namespace.block_tokens % page_tokens:
            sizes = f"blocks of {namespace.block_tokens} tokens and pages of {page_tokens}"
            raise ConfigError(f"expected a block that is made of whole pages, got {sizes}")
        self.namespace, self.page_tokens, self.prefix_caching = namespace, page_tokens, prefix_caching
        self.pages_per_block = namespace.block_tokens // page_tokens if namespace else pages
        self.data = model.new_kv(pages * page_tokens)[:, :, 0].unflatten(3, (pages, page_tokens))
        self.free = Runs(pages)
        self.refs = [0] * pages
        self.index = PrefixIndex(pages, policy)
        self.tables: set[BlockTable] = set()
        self.owner: weakref.ref[object] | None = None
        self.counts: Counter[str] = Counter()

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the keys of the full blocks of `tokens`; none without a namespace."""
        return [] if self.namespace is None else self.namespace.keys(tokens)

    # --- tables ---------------------------------------------------------------------------------
    def new_table(self, keys: Sequence[bytes] = (), capacity: int = 0, counts: bool = True) -> BlockTable:
        """Return a new table with the pages of the longest prefix in the index, and room for `capacity` tokens.

        The pages of the prefix are shared, not copied. `table.keys` are the blocks that were found.

        Args:
            counts: whether `PagePool.counts` takes note of them; not when a request is tried a second time.

        Raises:
            PoolExhausted: there is no room; no table was opened.
        """
        table = BlockTable(self)
        self.tables.add(table)
        for key in self.index.find(keys):
            table.keys.append(key)
            table.pages += self.index.hold(key)
        self._use(table.pages)
        if counts:
            self.counts += Counter(requested=len(keys), hits=len(table.keys))
        try:
            self.grow(table, capacity)
        except PoolExhausted:
            self.close(table)
            raise
        return table

    def grow(self, table: BlockTable, capacity: int) -> None:
        """Give a table room for `capacity` tokens in all.

        Raises:
            PoolExhausted: there is no room; the table has not changed.
            InputError: the table is closed.
        """
        self._check_open(table)
        missing = -(-capacity // self.page_tokens) - len(table.pages)
        if missing > 0:
            table.pages += self._take(missing, after=table.pages[-1] if table.pages else -1)

    def evict_for(self, table: BlockTable, capacity: int) -> Iterator[tuple[bytes, Tensor]]:
        """Evict the blocks whose pages `grow` would take, one by one; nothing if there are too few pages.

        Yields:
            The key of a block, and its KV [L, P, H, B, D], which is valid until the next step.
        """
        missing = -(-capacity // self.page_tokens) - len(table.pages)
        while self.free.total < missing <= self.free.total + self.index.idle:
            evicted = self.index.evict()
            if evicted is None:
                return
            key, pages = evicted
            try:
                yield key, self.data[..., pages, :, :].flatten(-3, -2)
            finally:
                self._give_up(pages)

    def fork(self, table: BlockTable, blocks: int | None = None) -> BlockTable:
        """Return a second table with the same pages, for another continuation. A write copies a page that both have.

        Args:
            blocks: only the pages of so many leading blocks, all of them in the index; None for all pages.

        Raises:
            InputError: the table is closed, or has fewer blocks.
        """
        self._check_open(table)
        if blocks is not None and not 0 <= blocks <= len(table.keys):
            raise InputError(f"expected 0 … {len(table.keys)} blocks, got {blocks}")
        copy = BlockTable(self, table.pages[: None if blocks is None else blocks * self.pages_per_block])
        self.tables.add(copy)
        self._use(copy.pages)
        for key in table.keys[:blocks]:
            copy.keys.append(key)
            self.index.hold(key)
        return copy

    def close(self, table: BlockTable) -> None:
        """Give back a table's pages. Blocks in the index stay, and can be evicted once no table holds them.

        Raises:
            InputError: the table is closed already.
        """
        self._check_open(table)
        for key in reversed(table.keys):  # a parent becomes the newest after its successors
            self.index.let_go(key)
        self._give_up(table.pages)
        self.tables.remove(table)
        table.pages, table.keys, table.closed = [], [], True

    # --- the prefix index -----------------------------------------------------------------------
    def publish(self, table: BlockTable, keys: Sequence[bytes]) -> None:
        """Put the leading blocks of a table into the index, so that later tables find them.

        A block that another table has put there stays as it is.

        Args:
            keys: the keys of the table's full blocks, from the first on.

        Raises:
            InputError: the table is closed, has fewer pages, or holds other keys.
        """
        self._check_open(table)
        per_block = self.pages_per_block
        if len(keys) * per_block > len(table.pages) or list(keys[: len(table.keys)]) != table.keys[: len(keys)]:
            raise InputError(f"expected the keys of the {len(table.pages) // per_block} full blocks of this table")
        for i in range(len(table.keys), len(keys) if self.prefix_caching else 0):
            if keys[i] not in self.index:
                pages = table.pages[i * per_block : (i + 1) * per_block]
                displaced = self.index.add(keys[i], Block(pages, keys[i - 1] if i else None))
                if displaced is None:
                    return
                self._use(pages)
                self._give_up(displaced)
            table.keys.append(keys[i])
            self.index.hold(keys[i])

    # --- pages ----------------------------------------------------------------------------------
    def _take(self, count: int, after: int = -1) -> list[int]:
        """Return new pages, each with one reference. Evicts blocks if it must."""
        if count > self.free.total + self.index.idle:
            raise self._exhausted(count)
        while self.free.total < count:
            evicted = self.index.evict()
            if evicted is None:  # blocks of forks have pages in common, so fewer than `idle` became free
                raise self._exhausted(count)
            self._give_up(evicted[1])
        pages = self.free.take(count, after)
        self._use(pages)
        return pages

    def _exhausted(self, count: int) -> PoolExhausted:
        return PoolExhausted(
            f"{count} pages are needed, {self.free.total} are free and at most {self.index.idle} can be evicted; "
            f"wait for a request to end, or use a pool of more than {len(self.refs)} pages"
        )

    def _use(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.refs[page] += 1

    def _give_up(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.refs[page] -= 1
        self.free.put([page for page in pages if not self.refs[page]])

    def make_writable(self, table: BlockTable, start: int, stop: int) -> None:
        """Copy the pages of tokens start … stop - 1 that others read too, so that a write changes nothing for them.

        Raises:
            PoolExhausted: there is no page for a copy.
            InputError: the table is closed, or has no room for these tokens.
        """
        self._check_open(table)
        if not 0 <= start <= stop <= table.capacity:
            raise InputError(f"expected tokens in 0 … {table.capacity}, got {start} … {stop}; call grow first")
        for i in range(start // self.page_tokens, -(-stop // self.page_tokens)):
            page = table.pages[i]
            if self.refs[page] > 1:
                (copy,) = self._take(1, after=table.pages[i - 1] if i else -1)
                self.data[:, :, :, copy] = self.data[:, :, :, page]
                self._give_up([page])
                table.pages[i] = copy
                self.counts["copied"] += 1

    def write(self, data: Tensor, table: BlockTable, kv: Tensor, start: int) -> None:
        """Write the KV of new tokens, [..., T, D], into `data`, which is the pool's or one layer of it."""
        stop = start + kv.shape[-2]
        first, last = start // self.page_tokens, -(-stop // self.page_tokens)
        pages = table.pages[first:last]
        if start == stop:
            return
        if pages == list(range(pages[0], pages[0] + len(pages))):
            run = data[..., pages[0] : pages[0] + len(pages), :, :].flatten(-3, -2)
            run[..., start - first * self.page_tokens : stop - first * self.page_tokens, :] = kv
            return
        position = torch.arange(start, stop, device=data.device)
        numbers = torch.tensor(table.pages, device=data.device)
        data[..., numbers[position // self.page_tokens], position % self.page_tokens, :] = kv

    def view(self, table: BlockTable, start: int, stop: int) -> Tensor | None:
        """Return the KV of the tokens start … stop - 1 as a view of the pool; None if their pages are no run."""
        first, last = start // self.page_tokens, -(-stop // self.page_tokens)
        pages = table.pages[first:last]
        if not pages or pages != list(range(pages[0], pages[0] + len(pages))):
            return None
        run = self.data[..., pages[0] : pages[0] + len(pages), :, :].flatten(-3, -2)
        part: Tensor = run[..., start - first * self.page_tokens : stop - first * self.page_tokens, :]
        return part

    def read(self, data: Tensor, table: BlockTable, stop: int) -> Tensor:
        """Return the KV of the tokens before `stop`, [..., stop, D], out of `data`: a view if it can be one."""
        pages = table.pages[: -(-stop // self.page_tokens)]
        if not pages or pages == list(range(pages[0], pages[0] + len(pages))):
            first = pages[0] if pages else 0
            part = data[..., first : first + len(pages), :, :]
        else:
            part = data.index_select(-3, torch.tensor(pages, device=data.device))
        return part.flatten(-3, -2)[..., :stop, :]

    # --- checks ---------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Assert that no page is lost, given out twice, or counted wrongly, in the pool and in the index."""
        refs = Counter(page for table in self.tables for page in table.pages)
        refs.update(page for block in self.index.blocks.values() for page in block.pages)
        assert self.refs == [refs[page] for page in range(len(self.refs))], "reference counts"
        free = sorted(page for first, n in self.free.lengths.items() for page in range(first, first + n))
        assert free == [page for page, n in enumerate(self.refs) if not n], "free pages"
        assert self.free.total == len(free), "the number of free pages"
        self.index.check_integrity(Counter(key for table in self.tables for key in table.keys))

    def _check_open(self, table: BlockTable) -> None:
        if table.closed or table.pool is not self:
            raise InputError("expected an open table of this pool; its pages were given back already")
