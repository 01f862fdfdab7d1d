"""Widgets: a still picture before they run, redrawn when a control moves; guesses kept in the work folder."""

import base64
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kvlab.course import plots
from kvlab.course.claims import CLAIMS
from kvlab.course.guesses import load_guesses
from kvlab.course.widgets import Explorer, Guesses

PNG = b"\x89PNG"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    return tmp_path


def make_explorer() -> Explorer:
    def draw(size: int, kind: str, on: bool) -> Figure:
        fig, ax = plots.new_figure("t")
        ax.plot([0, size] if on else [0])
        return fig

    return Explorer(draw, lambda size, kind, on: f"{kind}: {size}, {on}", size=(3, 1, 9), kind=["a", "b"], on=True)


def test_an_explorer_stands_in_with_a_picture_and_a_sentence() -> None:
    bundle = make_explorer()._repr_mimebundle_()
    assert float(make_explorer()._image.width) == 720, "as wide on the page as a plot, with twice its pixels"
    assert bundle["text/plain"] == "[interactive: run this cell to use it] a: 3, True"
    assert base64.b64decode(bundle["image/png"]).startswith(PNG)
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_moving_a_control_redraws_picture_sentence_and_alt_text() -> None:
    explorer = make_explorer()
    before = explorer.still()
    explorer._controls["size"].value = 7
    explorer._controls["kind"].value = "b"
    after = explorer.still()
    assert after[0] == "b: 7, True"
    assert after[1] != before[1] and after[1].startswith(PNG)
    assert explorer._image.alt == "b: 7, True"


def test_the_slider_beside_a_number_is_the_same_number() -> None:
    """The number has the name; the handle of a slider cannot have one."""
    explorer = make_explorer()
    number, slider = explorer.children[0].children
    slider.value = 6
    assert (number.value, number.description, explorer.still()[0]) == (6, "size", "a: 6, True")
    number.value = 99
    assert slider.value == number.value == 9, "the highest"


def type_in(guesses: Guesses, **texts: str) -> str:
    for name, text in texts.items():
        guesses._fields[name].value = text
    guesses._keep(None)
    return str(guesses._said.value)


def test_guesses_are_kept_and_come_back(work: Path) -> None:
    said = type_in(Guesses(), latency="4", cost="50 %")
    assert f"Kept 2 of {len(CLAIMS)}." in said
    assert json.loads((work / "guesses.json").read_text()) == {"latency": 4.0, "cost": 50.0}
    assert Guesses()._fields["latency"].value == "4"


def test_a_guess_that_is_no_number_is_told(work: Path) -> None:
    assert "expected a number of 0 or more, got &#x27;much&#x27;" in type_in(Guesses(), latency="much")
    assert load_guesses() == {}


def test_one_question_is_asked_alone_and_keeps_the_other_guesses(work: Path) -> None:
    type_in(Guesses(), latency="4")
    one = Guesses("first_cache")
    assert list(one._fields) == ["first_cache"]
    assert "your dict" in one._repr_mimebundle_()["text/plain"]
    assert "Kept 1 of 1" in type_in(one, first_cache="12 x")
    assert load_guesses() == {"latency": 4.0, "first_cache": 12.0}


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"latency": "x"}'])
def test_a_damaged_guess_file_counts_as_none(work: Path, content: str) -> None:
    (work / "guesses.json").write_text(content)
    assert load_guesses() == {}
    Guesses()


def test_the_guess_widget_asks_every_claim_before_it_runs(work: Path) -> None:
    text = Guesses()._repr_mimebundle_()["text/plain"]
    assert all(claim.question in text for claim in CLAIMS)
