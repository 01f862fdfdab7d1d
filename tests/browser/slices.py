"""The cells of a notebook that its widgets need: a notebook that runs in seconds where the whole one takes minutes.

A cell needs the last cells before it that bind the names which it reads, and those that set what is in them. This
sees names, not what a call does elsewhere: a cell that it misses shows as a NameError of the cell that needs it.
"""

from __future__ import annotations

import ast
import re
import symtable
from collections.abc import Iterator

from nbformat import NotebookNode

WIDGET = "[interactive: run this cell"


def is_widget(cell: NotebookNode) -> bool:
    """Whether a cell shows a widget, by its stored output."""
    return cell.cell_type == "code" and WIDGET in str(cell.outputs)


def sliced(notebook: NotebookNode) -> NotebookNode:
    """The notebook with only the cells that its widgets need, without outputs; changes the notebook."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kept: list[NotebookNode] = []
    needed: set[str] = set()
    for cell in reversed(code):
        reads, binds, sets = effects(cell.source)
        if is_widget(cell) or (binds | sets) & needed:
            kept.insert(0, cell)
            needed = (needed - binds) | reads
    for cell in kept:
        cell.outputs, cell.execution_count = [], None
    notebook.cells = kept
    return notebook


def effects(source: str) -> tuple[set[str], set[str], set[str]]:
    """The names that a cell reads from earlier cells, those it binds, and those whose items or attributes it sets."""
    reads: set[str] = set()
    binds: set[str] = set()
    sets: set[str] = set()
    for statement in ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)).body:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        loops = isinstance(statement, ast.For | ast.With)  # these bind their names before they read them
        own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        reads |= set(_read(table)) - binds - (own if loops else set())
        binds |= own
        sets |= {name for node in ast.walk(statement) for name in _set(node)}
    return reads, binds, sets


def _read(table: symtable.SymbolTable) -> Iterator[str]:
    """The global names that a piece of code reads, inside its functions too."""
    top = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (top or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _read(inner)


def _set(node: ast.AST) -> Iterator[str]:
    """The names whose items or attributes a piece of code sets."""
    if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        if isinstance(node, ast.Name):
            yield node.id
