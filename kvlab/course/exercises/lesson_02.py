"""The exercises of notebook 02, paged blocks: reading pages, giving them back, copy-on-write, what to evict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import own_page, read_pages, release, victim


def _pages(heads: int, pages: int, page_tokens: int, D: int = 2) -> Tensor:
    """Pages whose numbers say where they are."""
    return torch.arange(heads * pages * page_tokens * D).float().reshape(heads, pages, page_tokens, D)


# --- read_pages ---------------------------------------------------------------------------------
def _read_in_pool_order(pages: Tensor, table: list[int], length: int) -> Tensor:
    return pages[:, sorted(table)].flatten(1, 2)[:, :length]


def _read_whole_pages(pages: Tensor, table: list[int], length: int) -> Tensor:
    return pages[:, table].flatten(1, 2)


def _read_first_pages(pages: Tensor, table: list[int], length: int) -> Tensor:
    return pages.flatten(1, 2)[:, :length]


def _read_cuts_heads(pages: Tensor, table: list[int], length: int) -> Tensor:
    return pages[:, table].flatten(1, 2)[:length]


def _read_not_joined(pages: Tensor, table: list[int], length: int) -> Tensor:
    return pages[:, table][:, :length]


def _read_by_reshape(pages: Tensor, table: list[int], length: int) -> Tensor:
    picked = pages.transpose(0, 1)[table]  # [pages, H, page_tokens, D]
    return picked.reshape(pages.shape[0], -1, pages.shape[3])[:, :length]


READ_PAGES = Exercise(
    name="read_pages",
    number="02.1",
    difficulty=2,
    reference=read_pages,
    cases=(
        (_pages(1, 4, 2), [2, 0], 4),
        (_pages(2, 4, 2), [3, 1, 2], 5),
        (_pages(2, 5, 4), [4, 0], 5),
        (_pages(2, 4, 2), [1], 2),
        (_pages(2, 4, 2), [], 0),
    ),
    wrong=(
        Wrong(_read_in_pool_order, "the table's order is the order of the tokens: page 2 before page 0, if it says so"),
        Wrong(_read_whole_pages, "the last page may be partly filled: return `length` tokens and no more"),
        Wrong(_read_first_pages, "the pages are those in the table, not the first ones of the pool"),
        Wrong(
            _read_cuts_heads, "`length` cuts the axis of tokens, which is the second one; the first is that of heads"
        ),
        Wrong(_read_not_joined, "the axes of pages and of tokens in a page must become one: see `flatten`"),
        Wrong(
            _read_by_reshape,
            "tokens of different heads got mixed: `reshape` joins neighbouring axes, so pages and page_tokens must be "
            "side by side before",
        ),
    ),
    hint="pick the pages of the table, in its order; join the axes of pages and of tokens; cut to `length` tokens",
    after="kvlab picks nothing if the pages are neighbours: then the same numbers are a view of the pool.",
)


# --- release ------------------------------------------------------------------------------------
def first_release(refs: list[int], table: list[int]) -> None:
    """Give back the pages of a request that has ended."""
    for page in table:
        refs[page] = 0


def _what_is_left(result: Any, args: tuple[Any, ...]) -> Any:
    """The counts and the table, and what it returned, if anything."""
    refs, table = args
    returned = [] if result is None else [f"returned {result!r}"]
    return [f"refs {refs}", f"table {table} afterwards", *returned]


def _release_shared_too(refs: list[int], table: list[int]) -> None:
    first_release(refs, table)
    table.clear()


def _release_keeps_the_table(refs: list[int], table: list[int]) -> None:
    for page in table:
        refs[page] -= 1


def _release_only_unshared(refs: list[int], table: list[int]) -> None:
    for page in table:
        if refs[page] == 1:
            refs[page] = 0
    table.clear()


def _release_while_removing(refs: list[int], table: list[int]) -> None:
    for page in table:
        refs[page] -= 1
        table.remove(page)


RELEASE = Exercise(
    name="release",
    number="02.2",
    difficulty=3,
    reference=release,
    given=first_release,
    cases=(
        ([1, 1, 0, 0], [0, 1]),
        ([2, 2, 1, 1], [0, 1, 2]),
        ([3, 0, 1], [2, 0]),
        ([1, 2], []),
    ),
    wrong=(
        Wrong(_release_shared_too, "page 0 is in the table of another request too: how many have it now?"),
        Wrong(
            _release_keeps_the_table,
            "the counts are right. But the caller's table still names pages that are no longer its own (`table = []` "
            "only names a new list): called twice, it would give them back twice",
        ),
        Wrong(_release_only_unshared, "a page that others have too has one reader less now"),
        Wrong(_release_while_removing, "a list that changes during its own loop skips items"),
    ),
    hint="each page of the table has one request less; afterwards the request has no pages",
    observe=_what_is_left,
    after="A page is free when its count is 0, and nobody has to search who else uses it. Python frees objects so too.",
)


# --- own_page -----------------------------------------------------------------------------------
def _what_is_owned(result: Any, args: tuple[Any, ...]) -> Any:
    """What it returned, the counts, the table, and the numbers of the tokens before `position`."""
    pages, refs, table, position = args
    here = [page for page in table if 0 <= page < pages.shape[1]]
    numbers = [int(number) for number in read_pages(pages, here, position).flatten()]
    return [f"returned {result!r}", f"refs {refs}", f"table {table}", f"numbers before position: {numbers}"]


def _own_shared(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    i = position // pages.shape[2]
    if i == len(table):
        table.append(refs.index(0))
        refs[table[i]] = 1
    return table[i]


def _own_without_numbers(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    return own_page(pages.clone(), refs, table, position)


def _own_old_count_stays(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    i, before = position // pages.shape[2], list(table)
    page = own_page(pages, refs, table, position)
    if i < len(before) and before[i] != page:
        refs[before[i]] += 1
    return page


def _own_always_copies(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    i = position // pages.shape[2]
    if i < len(table):
        refs[table[i]] += 1
        page = own_page(pages, refs, table, position)
        refs[page] = 1
        return page
    return own_page(pages, refs, table, position)


def _own_position_is_page(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    return own_page(pages, refs, table, min(position, len(table)) * pages.shape[2])


def _own_appends_the_copy(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    i = position // pages.shape[2]
    if i < len(table) and refs[table[i]] > 1:
        new = refs.index(0)
        refs[new] = 1
        refs[table[i]] -= 1
        pages[:, new] = pages[:, table[i]]
        table.append(new)
        return new
    return own_page(pages, refs, table, position)


def _own_new_is_not_counted(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    before = list(table)
    page = own_page(pages, refs, table, position)
    if table != before:
        refs[page] = 0
    return page


def _own_two_at_most(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    i, before = position // pages.shape[2], list(table)
    page = own_page(pages, refs, table, position)
    if i < len(before) and before[i] != page:
        refs[before[i]] = 1
    return page


def _own_takes_a_page_first(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    refs.index(0)
    return own_page(pages, refs, table, position)


def _own_table_stays(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    before = list(table)
    page = own_page(pages, refs, table, position)
    if len(table) == len(before):
        table[:] = before
    return page


def _own_returns_the_place(pages: Tensor, refs: list[int], table: list[int], position: int) -> int:
    own_page(pages, refs, table, position)
    return position // pages.shape[2]


OWN_PAGE = Exercise(
    name="own_page",
    number="02.3",
    difficulty=4,
    reference=own_page,
    cases=(
        (_pages(1, 4, 2), [1, 0, 0, 0], [0], 1),  # its own page
        (_pages(1, 4, 2), [1, 0, 0, 0], [0], 2),  # a new page
        (_pages(2, 4, 2), [1, 2, 0, 0], [0, 1], 3),  # a shared page
        (_pages(2, 4, 2), [2, 2, 1, 0], [0, 1], 0),  # a shared page that is not the last
        (_pages(1, 3, 4), [0, 1, 1], [], 0),  # the first page of a request
        (_pages(1, 4, 2), [3, 1, 0, 0], [0], 1),  # a page that three have
        (_pages(1, 2, 2), [1, 1], [0, 1], 3),  # its own page, and none is free
    ),
    wrong=(
        Wrong(
            _own_shared,
            "a page with a count of 2 is returned: what this request writes there, the other one reads. It needs a "
            "copy",
        ),
        Wrong(
            _own_without_numbers,
            "the new page holds other numbers than the shared one: the tokens before `position` in that page are still "
            "needed",
        ),
        Wrong(_own_old_count_stays, "the shared page has one request less now"),
        Wrong(_own_always_copies, "a page that only this request has needs no copy"),
        Wrong(_own_position_is_page, "`position` is a token: its page in the table is position // page_tokens"),
        Wrong(_own_appends_the_copy, "the copy takes the place of the shared page in the table, not a place after it"),
        Wrong(_own_two_at_most, "three requests had that page: how many have it after one of them got a copy?"),
        Wrong(
            _own_takes_a_page_first,
            "a full pool has no free page, and a request that writes to a page of its own needs none: look for a free "
            "page only in the two other cases",
        ),
        Wrong(_own_table_stays, "the copy must be in the table, in the place of the shared page"),
        Wrong(_own_returns_the_place, "return the page's number in the pool, not its place in the table"),
        Wrong(_own_new_is_not_counted, "the new page still counts as free: who takes the next one gets it too"),
    ),
    hint="three cases: a page of its own, a new page behind the last one, and a shared page, which is copied first",
    observe=_what_is_owned,
    after="Operating systems do the same after fork(): two processes share memory until one of them writes.",
)


# --- victim -------------------------------------------------------------------------------------
Parents = dict[bytes, bytes | None]


def _victim_oldest(parents: Parents, in_use: set[bytes]) -> bytes | None:
    return next((key for key in parents if key not in in_use), None)


def _victim_any_leaf(parents: Parents, in_use: set[bytes]) -> bytes | None:
    return next((key for key in parents if key not in set(parents.values())), None)


def _victim_newest(parents: Parents, in_use: set[bytes]) -> bytes | None:
    return victim(dict(reversed(parents.items())), in_use)


def _victim_first_blocks(parents: Parents, in_use: set[bytes]) -> bytes | None:
    return next((key for key, parent in parents.items() if parent is None and key not in in_use), None)


def _victim_raises(parents: Parents, in_use: set[bytes]) -> bytes | None:
    needed = in_use | set(parents.values())
    return next(key for key in parents if key not in needed)


def _victim_end_of_the_oldest_chain(parents: Parents, in_use: set[bytes]) -> bytes | None:
    key = next((key for key in parents if key not in in_use), None)
    while key in parents.values():
        key = next(child for child, parent in parents.items() if parent == key)
    return key


def _victim_falls_back(parents: Parents, in_use: set[bytes]) -> bytes | None:
    return victim(parents, in_use) or _victim_oldest(parents, in_use)


VICTIM = Exercise(
    name="victim",
    number="02.4",
    difficulty=3,
    reference=victim,
    cases=(
        ({b"a": None, b"b": b"a", b"c": b"b"}, set()),
        ({b"x": None, b"a": None, b"b": b"a"}, set()),
        ({b"a": None, b"b": b"a", b"x": None, b"y": b"x"}, {b"a", b"b"}),
        ({b"a": None, b"b": b"a", b"c": b"a"}, {b"a", b"b"}),
        ({b"a": None, b"b": b"a"}, {b"a", b"b"}),
        ({b"a": None, b"x": None, b"b": b"a"}, set()),
        ({b"a": None, b"b": b"a"}, {b"b"}),
        ({}, set()),
    ),
    wrong=(
        Wrong(_victim_oldest, "the blocks behind this one are lost with it, because a prefix ends at its first gap"),
        Wrong(_victim_any_leaf, "a request reads this block now"),
        Wrong(_victim_newest, "of all that may go, the one used longest ago: the dict begins with it"),
        Wrong(_victim_first_blocks, "a first block is the worst choice: everything behind it begins there"),
        Wrong(
            _victim_end_of_the_oldest_chain,
            "not the end of the oldest chain, but of all ends the one used longest ago; and an end may be in use",
        ),
        Wrong(
            _victim_falls_back,
            "if no end of a chain may go, nothing may go: a block whose successor is in use is still needed",
        ),
        Wrong(_victim_raises, "if every block is needed there is none to evict: return None"),
    ),
    hint="go through the keys from the oldest on; skip those in use and those that are another block's parent",
    after="kvlab's pool does this with any of five policies (`kvlab.core.policies`): needed blocks are pinned.",
)
