"""Streams take every text, whatever their encoding; what is no stream of ours stays as it is; files are UTF-8."""

import ast
import io
import sys
from pathlib import Path

import pytest

from kvlab.lab.streams import accept_any_text

TEXT = "é … ✔ 前 \udcff"


def printed(monkeypatch: pytest.MonkeyPatch, name: str, encoding: str) -> bytes:
    content = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(content, encoding=encoding, write_through=True))
    accept_any_text()
    print(TEXT, file=getattr(sys, name), end="")
    return content.getvalue()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("encoding", "escaped"),
    [
        ("ascii", rb"\xe9 \u2026 \u2714 \u524d \udcff"),
        ("latin-1", b"\xe9" + rb" \u2026 \u2714 \u524d \udcff"),
        ("cp1252", b"\xe9 \x85" + rb" \u2714 \u524d \udcff"),
        ("gbk", "é … ".encode("gbk") + rb"\u2714 " + "前".encode("gbk") + rb" \udcff"),
        ("utf-8", "é … ✔ 前 ".encode() + rb"\udcff"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(
    monkeypatch: pytest.MonkeyPatch, name: str, encoding: str, escaped: bytes
) -> None:
    assert printed(monkeypatch, name, encoding) == escaped


def test_closed_streams_and_a_notebooks_streams_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    monkeypatch.setattr(sys, "stderr", None)
    accept_any_text()
    print(TEXT, end="")
    assert notebook.getvalue() == TEXT


# --- files --------------------------------------------------------------------------------------
ROOT = Path(__file__).parents[2]


def text_files_of_the_locale(source: str) -> list[str]:
    """Calls that read or write text in the encoding that the surroundings chose."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [ast.unparse(argument) for argument in call.args]
        said = any(k.arg == "encoding" for k in call.keywords) or any(
            g.strip("'\"") in ("utf-8", "ascii") for g in given
        )
        binary = any(g.strip("'\"") in ("rb", "wb", "ab") for g in given)
        if name in ("read_text", "write_text", "open", "fdopen") and not (said or binary):
            found.append(ast.unparse(call))
    return found


def test_files_are_utf_8_whatever_the_locale() -> None:
    """What is opened in another way than as a file of text: files of the system, weights, seals, databases, values,
    archives."""
    others = ("os.open(", "safe_open(", "fmt.seal.open(", "lmdb.open(", "self._folder.open(", "tarfile.open(")
    files = [*ROOT.glob("kvlab/**/*.py"), *ROOT.glob("scripts/*.py"), ROOT / "conftest.py"]
    found = {(file.name, call) for file in files for call in text_files_of_the_locale(file.read_text("utf-8"))}
    assert not {(name, call) for name, call in found if not call.startswith(others)}


def test_the_check_above_finds_what_it_looks_for() -> None:
    bad = "p.read_text()\np.write_text(t)\nopen(f)\np.open('a')\nos.fdopen(n)"
    good = "p.read_text('utf-8')\np.write_text(t, 'utf-8')\nopen(f, encoding='utf-8')\np.open('rb')\np.read_bytes()"
    assert len(text_files_of_the_locale(bad)) == 5 and text_files_of_the_locale(good) == []
