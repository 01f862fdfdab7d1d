"""Build docs/claims.md: each claim of the source document, what came out here, and how far that carries.

    python scripts/build_claims.py                # write the page
    python scripts/build_claims.py --check        # write nothing; exit 1 if the page would change

The rows are in docs/claims.toml. No measured number is written there: `{...}` is a reference, which this script
replaces by the number. A reference names a source, then functions, then a format:

    {bench_ttft:rows[prefix_tokens=2048].speedup_redis:.1f}     docs/results/bench_ttft.json, the one row that fits
    {bench_hash:by_prefix[0].us:.1f}                            by its place; [-1] is the last
    {bench_ttft:rows[*].speedup_redis | most:.1f}               of all rows; [*,field=value] of all that fit
    {source:tok_per_s.none}                                     the table [source] of claims.toml
    {count:code_cells | floor 50}                               what this script counts, see `counted`
    {04_kv_serialization#claim-plot "real KV …%"}               the number in the place of … in what a cell shows
    {docs/traces.md "| chat | ~ | … | ~ |"}                     the same in a text file; ~ is anything on the line

    | percent, | saved               times 100; the percentage saved by something so many times smaller
    | over X, under X, times X, plus X   the number by X, X by the number, and so on; X is a number or a reference, in
                                     which [field=same] takes the field's value from the row at hand
    | floor N                        down to a multiple of N
    | least, | most, | count         of several numbers
    | by FIELD                       several numbers as a list, each with the FIELD of its row

A format is Python's (`.1f`, `,.0f`). Integers and words need none; other numbers without a format are an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Final

from scripts.repository import BLOB

ROOT: Final = Path(__file__).resolve().parents[1]
VERDICTS: Final = ("measured", "computed", "cited", "no evidence found")
HOLDS: Final = ("yes", "no", "depends", "not testable here")
REFERENCE: Final = re.compile(r"\{([^{}]+)\}")
PIPE: Final = re.compile(r' \| (?=(?:[^"]*"[^"]*")*[^"]*$)')  # outside quotes
FORMAT: Final = re.compile(r":(,?(?:\.\d)?[fd]|,)$")
TEXT: Final = re.compile(r'(\S+) "([^"]*)"')
STEP: Final = re.compile(r"\.?([^.\[\]]+)|\[([^\[\]]*)\]")
NUMBER: Final = r"(-?[\d.,]*\d)"
TYPED: Final = re.compile(r"(?<![\w.,#-])\d[\d,.]*(?<=\d)(?!\w)")


class ClaimError(Exception):
    """The ledger cannot be built; the message says which claim, which reference and what is there instead."""


# --- Where numbers come from --------------------------------------------------------------------
@dataclass(frozen=True)
class Found:
    """A number or word, and the row of a list that it was found in."""

    value: Any
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The files that references may name.

    Attributes:
        source: the source document's own numbers, of the same name in claims.toml.
        documents: the documents that the source document lists, by path.
    """

    root: Path
    source: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[str] = ()

    def data(self, name: str) -> Any:
        """The JSON of a results file, the source document's numbers, or what is counted."""
        if name == "source":
            return self.source
        if name == "count":
            return self.counted()
        return json.loads(self.find("docs/results", f"{name}.json").read_text(encoding="utf-8"))

    def cells(self, notebook: str) -> dict[str, str]:
        """What each cell of a notebook shows, by its id: a code cell's text outputs, the text of another one."""
        return _shown(self.find("notebooks", f"{notebook}.ipynb"))

    def text(self, place: str) -> str:
        """What a cell (`notebook#cell`) shows, or a text file by its path."""
        notebook, _, cell = place.partition("#")
        if cell:
            return self.cell(notebook, cell)
        path = self.root / place
        if not path.is_file():
            raise ClaimError(f"there is no file {place}")
        return path.read_text(encoding="utf-8")

    def cell(self, notebook: str, cell: str) -> str:
        """What one cell shows.

        Raises:
            ClaimError: the notebook has no cell with this id.
        """
        cells = self.cells(notebook)
        if cell not in cells:
            raise ClaimError(f"notebooks/{notebook}.ipynb has no cell {cell!r}; it has {', '.join(cells)}")
        return cells[cell]

    def find(self, folder: str, name: str) -> Path:
        """A file of a folder.

        Raises:
            ClaimError: it does not exist; the message says which do.
        """
        path = self.root / folder / name
        if not path.exists():
            others = sorted(other.stem for other in path.parent.glob(f"*{path.suffix}"))
            raise ClaimError(f"there is no {folder}/{name}; there are {', '.join(others)}")
        return path

    def counted(self) -> dict[str, int]:
        """Code cells of all notebooks, and how many of the listed documents exist, with how many words."""
        there = [self.root / path for path in self.documents if (self.root / path).exists()]
        notebooks = sorted((self.root / "notebooks").glob("*.ipynb"))
        return {
            "code_cells": sum(_code_cells(path) for path in notebooks),
            "notebooks": len(notebooks),
            "documents": len(there),
            "words": sum(len(path.read_text(encoding="utf-8").split()) for path in there),
        }


def _cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def _code_cells(path: Path) -> int:
    return sum(cell["cell_type"] == "code" and cell["id"] != "colab-setup" for cell in _cells_of(path))


def _shown(path: Path) -> dict[str, str]:
    return {cell["id"]: "\n".join(_texts(cell)) for cell in _cells_of(path)}


def _texts(cell: Mapping[str, Any]) -> Iterator[str]:
    if cell["cell_type"] != "code":
        yield "".join(cell["source"])
    for output in cell.get("outputs", ()):
        yield "".join(output.get("text", ""))
        for mime, text in output.get("data", {}).items():
            if mime in ("text/plain", "text/markdown"):
                yield "".join(text)


# --- References ---------------------------------------------------------------------------------
def look_up(reference: str, files: Files) -> list[Found]:
    """What a reference without a format leads to.

    Raises:
        ClaimError: it leads nowhere.
    """
    return _evaluate(reference, files, {})[0]


def show(reference: str, files: Files) -> str:
    """The text that takes the place of a reference.

    Raises:
        ClaimError: as `look_up`.
    """
    bare, spec = _without_format(reference)
    *before, last = PIPE.split(bare)
    if last.startswith("by "):
        name = last.removeprefix("by ")
        values, _ = _evaluate(" | ".join(before), files, {})
        return ", ".join(f"{written(value.value, spec)} ({written(_field(value.row, name), '')})" for value in values)
    values, several = _evaluate(bare, files, {})
    if several:
        raise ClaimError(f"{len(values)} values: add | least, | most, | count or | by FIELD")
    return written(values[0].value, spec)


def _without_format(reference: str) -> tuple[str, str]:
    found = FORMAT.search(reference)
    return (reference[: found.start()], found[1]) if found else (reference, "")


def written(value: Any, spec: str) -> str:
    """A value as text; a number that is not whole needs a format."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and not spec:
        return value
    if isinstance(value, float) and not spec:
        raise ClaimError(f"{value!r} needs a format, for example :.1f")
    return format(number(value), spec or ",")


def number(value: Any) -> float | int:
    """A value as a number; text may have commas, as in 12,345."""
    if isinstance(value, str) and re.fullmatch(NUMBER, value):
        value = float(value.replace(",", ""))
    if not isinstance(value, int | float):
        raise ClaimError(f"expected a number, got {value!r}")
    return value


def _evaluate(reference: str, files: Files, row: Mapping[str, Any]) -> tuple[list[Found], bool]:
    """The values of a reference, and whether they are several on purpose."""
    place, *functions = PIPE.split(reference)
    values, several = _read(place, files, row)
    for function in functions:
        name, _, argument = function.partition(" ")
        if name in TOGETHER:
            (one, *more) = inner = [value.value for value in values]
            values, several = [Found(TOGETHER[name](one if isinstance(one, list) and not more else inner))], False
        elif name in EACH:
            values = [_apply(name, argument, value, files) for value in values]
        else:
            raise ClaimError(f"unknown function {name!r}; there are {', '.join([*EACH, *TOGETHER, 'by'])}")
    return values, several


def _apply(name: str, argument: str, value: Found, files: Files) -> Found:
    """A function of one value. Its operand, if it has one, is a number or a reference."""
    operand = 0.0
    if re.fullmatch(r"-?\d+(\.\d+)?", argument):
        operand = float(argument)
    elif argument:
        others, several = _evaluate(argument, files, value.row)
        if several:
            raise ClaimError(f"{name} needs one number, got {len(others)} from {argument}; [field=same] chooses one")
        operand = number(others[0].value)
    return Found(EACH[name](number(value.value), operand), value.row)


EACH: Final[dict[str, Callable[[float, float], float]]] = {
    "percent": lambda x, _: 100 * x,
    "saved": lambda x, _: 100 * (1 - 1 / x),
    "over": lambda x, y: x / y,
    "under": lambda x, y: y / x,
    "times": lambda x, y: x * y,
    "plus": lambda x, y: x + y,
    "floor": lambda x, y: int(x // y * y),
}
TOGETHER: Final[dict[str, Callable[[list[Any]], Any]]] = {
    "least": lambda values: min(map(number, values)),
    "most": lambda values: max(map(number, values)),
    "count": len,
}


def _read(place: str, files: Files, row: Mapping[str, Any]) -> tuple[list[Found], bool]:
    if text := TEXT.fullmatch(place):
        return [Found(_number_in(files.text(text[1]), text[2]))], False
    name, colon, path = place.partition(":")
    if not colon:
        raise ClaimError('expected FILE:PATH, NOTEBOOK#CELL "…" or FILE "…"')
    return _walk(files.data(name), path, row)


def _number_in(text: str, pattern: str) -> str:
    """The one number in the place of `…`; `~` is anything on the line."""
    if pattern.count("…") != 1:
        raise ClaimError(f"expected one … in {pattern!r}")
    parts = (re.escape(part).replace("\\~", "~").replace("~", "[^\n]*?") for part in pattern.split("…"))
    found = set(re.findall(NUMBER.join(parts), text))
    if len(found) != 1:
        what = f"{len(found)} different numbers" if found else "nothing"
        raise ClaimError(f"{pattern!r} fits {what} in: {' '.join(text.split())[:300]}")
    return str(found.pop())


def _walk(data: Any, path: str, row: Mapping[str, Any]) -> tuple[list[Found], bool]:
    values, several, at = [Found(data, row)], False, 0
    for step in STEP.finditer(path):
        if step.start() != at:
            break
        at, (name, selector) = step.end(), step.groups()
        if name is not None:
            values = [Found(_field(value.value, name), value.row) for value in values]
        else:
            chosen = [_select(value.value, selector, row) for value in values]
            values, several = [one for ones in chosen for one in ones], several or "*" in selector.split(",")
    if at != len(path):
        raise ClaimError(f"cannot read the path {path!r} from {path[at:]!r} on")
    return values, several


def _field(data: Any, name: str) -> Any:
    if not isinstance(data, Mapping) or name not in data:
        there = ", ".join(data) if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise ClaimError(f"there is no {name!r}; there is {there}")
    return data[name]


def _select(rows: Any, selector: str, row: Mapping[str, Any]) -> list[Found]:
    """Rows of a list: by place, all, or those whose fields have these values."""
    if not isinstance(rows, list):
        raise ClaimError(f"[{selector}] needs a list, got a {type(rows).__name__}")
    if re.fullmatch(r"-?\d+", selector):
        if not -len(rows) <= int(selector) < len(rows):
            raise ClaimError(f"there is no [{selector}] in a list of {len(rows)}")
        return [_row(rows[int(selector)])]
    wanted = [part.partition("=")[::2] for part in selector.split(",") if part != "*"]
    pairs = [(name, _as_text(_field(row, name)) if value == "same" else value) for name, value in wanted]
    fitting = [_row(one) for one in rows if all(_as_text(_field(one, name)) == value for name, value in pairs)]
    if not fitting or (len(fitting) > 1 and "*" not in selector.split(",")):
        there = {name: sorted({_as_text(_field(one, name)) for one in rows}) for name, _ in wanted}
        raise ClaimError(f"[{selector}] fits {len(fitting)} rows; there are {there}")
    return fitting


def _row(one: Any) -> Found:
    return Found(one, one if isinstance(one, Mapping) else {})


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- Claims -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """A row.

    Attributes:
        says: the source document's number, in a few words.
        came_out: what came out here, with references.
        inputs: the numbers in it that are conditions and no results, such as a block size.
        holds: one of `HOLDS`, or a check: `values` (references), and `at_least`, `at_most` or `between`; or checks
            by the kind of their values, such as "measured" and "computed".
        cells: where it can be seen, each as `notebook#cell`.
        tests: tests of this repository that show it, each as `file::name`.
        cited: what others say in public, with links.
        searched: for what was not found, where it was looked for.
    """

    id: str
    theme: str
    says: str
    came_out: str
    verdict: str
    holds: str | Mapping[str, Any]
    inputs: Sequence[str] = ()
    cells: Sequence[str] = ()
    tests: Sequence[str] = ()
    cited: str = ""
    searched: str = ""

    @property
    def references(self) -> list[str]:
        """The references of its text."""
        return REFERENCE.findall(self.came_out)


@dataclass(frozen=True)
class Row:
    """A claim with its numbers filled in."""

    claim: Claim
    came_out: str
    holds: str
    where: str
    cells: str


@dataclass(frozen=True)
class Ledger:
    """All claims, and the files that their references name."""

    claims: Sequence[Claim]
    files: Files


def load(path: Path, root: Path = ROOT) -> Ledger:
    """Read the claims.

    Raises:
        ClaimError: a claim lacks a field, has an unknown one, or breaks a rule of `complaints`.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    claims = [_claim(entry) for entry in table["claim"]]
    twice = [name for name, n in Counter(claim.id for claim in claims).items() if n > 1]
    said = [f"{name}: this id is used twice" for name in twice]
    said += [f"{claim.id}: {complaint}" for claim in claims for complaint in complaints(claim)]
    if said:
        raise ClaimError("\n".join(said))
    return Ledger(claims, Files(root, table["source"], table["documents"]))


def _claim(entry: Mapping[str, Any]) -> Claim:
    name = entry.get("id", "a claim without an id")
    unknown = entry.keys() - {one.name for one in fields(Claim)}
    lacking = {"id", "theme", "says", "came_out", "verdict", "holds"} - entry.keys()
    if unknown or lacking:
        raise ClaimError(f"{name}: unknown fields {sorted(unknown)}, missing fields {sorted(lacking)}")
    return Claim(**entry)


def complaints(claim: Claim) -> Iterator[str]:
    """What a row lacks for its verdict to mean something."""
    if claim.verdict not in VERDICTS:
        yield f"expected a verdict of {', '.join(VERDICTS)}, got {claim.verdict!r}"
    if isinstance(claim.holds, str) and claim.holds not in HOLDS:
        yield f"expected holds of {', '.join(HOLDS)}, got {claim.holds!r}"
    if claim.verdict == "no evidence found" and not claim.searched:
        yield "says that nothing was found, and not where it was searched"
    if claim.verdict == "cited" and "](https://" not in claim.cited:
        yield "is cited and has no link"
    if claim.verdict in ("measured", "computed"):
        if not (claim.references or claim.tests):
            yield f"is {claim.verdict} and refers to no result"
        text = REFERENCE.sub("", re.sub(r"`[^`]*`", "", claim.came_out))
        if typed := set(TYPED.findall(text)) - set(claim.inputs):
            yield f"has {', '.join(sorted(typed))} typed in; use a reference, or inputs for a condition"


def fill(claim: Claim, files: Files) -> Row:
    """A claim with its numbers.

    Raises:
        ClaimError: a reference, a cell or a test does not exist; the message names the claim.
    """
    try:
        cells = ", ".join(_cell_link(cell, files) for cell in claim.cells) or "—"
        return Row(claim, _expand(claim, files), judged(claim.holds, files), _where(claim, files), cells)
    except ClaimError as error:
        raise ClaimError(f"{claim.id}: {error}") from None


def _expand(claim: Claim, files: Files) -> str:
    def shown(match: re.Match[str]) -> str:
        try:
            return show(match[1], files)
        except (ClaimError, ZeroDivisionError) as error:
            raise ClaimError(f"{match[0]}: {error}") from None

    text = REFERENCE.sub(shown, claim.came_out)
    return f"{text} Searched: {claim.searched}" if claim.searched else text


def judged(holds: str | Mapping[str, Any], files: Files) -> str:
    """Whether a claim holds: as written, or yes if all values are within the bounds, no if none is, else depends.

    Kinds of values that are judged differently are told apart: "depends (measured no, computed yes)".

    Raises:
        ClaimError: a reference does not resolve, or a check is not of the known form.
    """
    if isinstance(holds, str):
        return holds
    words = {kind: _judge(check, files) for kind, check in _checks(holds).items()}
    first, *others = dict.fromkeys(words.values())
    return f"depends ({', '.join(f'{kind} {word}' for kind, word in words.items())})" if others else first


def _checks(holds: str | Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The checks of a claim by the kind of their values; "" if there is one for all."""
    if isinstance(holds, str):
        return {}
    return holds if holds and all(isinstance(check, Mapping) for check in holds.values()) else {"": holds}


def _judge(check: Mapping[str, Any], files: Files) -> str:
    try:
        values = [found.value for reference in check.get("values", ()) for found in look_up(reference, files)]
    except ZeroDivisionError:
        raise ClaimError(f"a value of {check['values']} is divided by 0") from None
    (name, *more) = [key for key in check if key != "values"] or [""]
    if not values or more or name not in ("at_least", "at_most", "between"):
        raise ClaimError(f"expected values, and at_least, at_most or between, got {dict(check)}")
    bounds = _limits(check[name], files)
    low, high = {"at_least": (bounds[0], inf), "at_most": (-inf, bounds[0])}.get(name, (bounds[0], bounds[-1]))
    within = [value is not None and low <= number(value) <= high for value in values]
    return "yes" if all(within) else "depends" if any(within) else "no"


def _limits(given: str | Sequence[str], files: Files) -> list[float]:
    return [number(look_up(one, files)[0].value) for one in ([given] if isinstance(given, str) else given)]


def _cell_link(cell: str, files: Files) -> str:
    notebook, _, name = cell.partition("#")
    files.cell(notebook, name)  # it exists
    return f"[{notebook.partition('_')[0]}]({BLOB}notebooks/{notebook}.ipynb) `{name}`"


def _where(claim: Claim, files: Files) -> str:
    """Links to the results, documents and tests that a row rests on, then what others say."""
    links = [_link(place, files.root) for place in _places(claim)]
    for test in claim.tests:
        path, _, name = test.partition("::")
        if f"def {name}(" not in files.text(path):
            raise ClaimError(f"{path} has no test {name}")
        links.append(f"[{name}](../{path})")
    joined = ", ".join(dict.fromkeys(filter(None, links)))
    return ". ".join(part for part in (joined, claim.cited) if part) or "—"


def _places(claim: Claim) -> Iterator[str]:
    """What a row refers to: results and tables as `name:`, text files by their paths, and "cell"."""
    checked = [reference for check in _checks(claim.holds).values() for reference in check.get("values", ())]
    for reference in (*claim.references, *checked):
        place, *functions = PIPE.split(_without_format(reference)[0])
        for part in (place, *(function.partition(" ")[2] for function in functions)):
            if text := TEXT.fullmatch(part):
                yield "cell" if "#" in text[1] else text[1]
            elif name := re.match(r"[a-z]\w*:", part):
                yield name[0]


NO_FILES: Final = {"cell": "what the cell shows", "count:": "counted when this page is built", "source:": ""}


def _link(place: str, root: Path) -> str:
    if place in NO_FILES:
        return NO_FILES[place]
    name = f"results/{place[:-1]}.json" if place.endswith(":") else Path(place).name
    path = name if (root / "docs" / name).exists() else f"../{place}"
    return f"`{name}`" if place.endswith(":") and path != name else f"[{Path(name).stem}]({path})"


# --- The page -----------------------------------------------------------------------------------
BEGIN: Final = "<!-- claims:begin -->"
END: Final = "<!-- claims:end -->"
HEAD: Final = "| the source says | what came out | where | verdict | holds | cell |\n|---|---|---|---|---|---|"


def build(ledger: Ledger) -> tuple[str, list[Row]]:
    """What the page has between its markers, and the rows.

    Raises:
        ClaimError: a reference, a cell or a test does not exist.
    """
    rows = [fill(claim, ledger.files) for claim in ledger.claims]
    themes = dict.fromkeys(claim.theme for claim in ledger.claims)
    tables = [_table(theme, [row for row in rows if row.claim.theme == theme]) for theme in themes]
    counts = _counts("verdict", [row.claim.verdict for row in rows], VERDICTS)
    held = _counts("holds", [row.holds.partition(" (")[0] for row in rows], HOLDS)
    return "\n\n".join([counts, held, *tables, _machines(ledger)]), rows


def refill(page: str, text: str) -> str:
    """The page with this text between its markers.

    Raises:
        ClaimError: the page does not have both markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ClaimError(f"docs/claims.md needs a line {BEGIN} and a line {END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def _counts(head: str, words: Sequence[str], order: Sequence[str]) -> str:
    count = Counter(words)
    lines = [f"| {word} | {count[word]} |" for word in order if count[word]]
    return "\n".join([f"| {head} | rows |", "|---|---|", *lines, f"| all | {len(words)} |"])


def _table(theme: str, rows: Sequence[Row]) -> str:
    lines = [_line(row.claim.says, row.came_out, row.where, row.claim.verdict, row.holds, row.cells) for row in rows]
    return "\n".join([f"## {theme}", "", HEAD, *lines])


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _machines(ledger: Ledger) -> str:
    """The results that rows rest on, with their machines, and whether these were busy."""
    places = {place for claim in ledger.claims for place in _places(claim) if place.endswith(":")} - NO_FILES.keys()
    lines = ["## Machines", "", "Noisy: the same work, measured twice, differed by more than 10 %.", ""]
    lines += ["| result | machine | noisy |", "|---|---|---|"]
    for place in sorted(places):
        data = ledger.files.data(place.removesuffix(":"))
        noisy = {True: "yes", False: "no", None: "not said"}[data.get("noisy")]
        lines.append(_line(_link(place, ledger.files.root), data.get("machine", "—"), noisy))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Build the page by the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page would change")
    args = parser.parse_args(argv)
    page = root / "docs" / "claims.md"
    try:
        text, rows = build(load(root / "docs" / "claims.toml", root))
        old = page.read_text(encoding="utf-8")
        new = refill(old, text)
    except ClaimError as error:
        print(f"docs/claims.toml: {error}", file=sys.stderr)
        return 1
    if args.check and new != old:
        print("docs/claims.md would change. Run: python scripts/build_claims.py", file=sys.stderr)
        return 1
    if not args.check:
        page.write_text(new, encoding="utf-8")
    print(f"docs/claims.md: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
