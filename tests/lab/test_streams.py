"""Streams take every text, whatever their encoding; what is no stream of ours stays as it is."""

import io
import sys

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
