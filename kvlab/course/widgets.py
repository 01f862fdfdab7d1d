"""Interactive widgets: `Explorer` is a picture with controls, `Guesses` takes the reader's own numbers.

A widget's content must also be readable without the widget: before its cell has run, on GitHub and
in print. There the reader sees a sentence and a still picture, if any. The cell's output contains
both, and the notebook tests compare the sentence.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import ipywidgets as w
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from kvlab.course import guesses
from kvlab.course.claims import CLAIMS
from kvlab.errors import InputError

DPI = 100  # pixels of the page per inch of a figure

Control = tuple[float, float, float] | list[Any] | bool
"""(value, low, high) for a number, a list of choices (the first is the default), or a bool for a checkbox."""


class Still(w.VBox):  # type: ignore[misc]
    """A box of widgets. Where widgets cannot run, a sentence and a picture (if any) appear instead."""

    def still(self) -> tuple[str, bytes]:
        """The sentence and the PNG (or b"") that appear instead of the widget."""
        raise TypeError("a subclass of Still must define still()")

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        data: dict[str, Any] = bundle[0] if isinstance(bundle, tuple) else bundle
        sentence, png = self.still()
        data["text/plain"] = f"[interactive: run this cell to use it] {sentence}"
        if png:
            data["image/png"] = base64.b64encode(png).decode()
        return data


class Explorer(Still):
    """Controls above a picture and a sentence, both updated when a control changes.

    Args:
        draw: returns a matplotlib figure for the controls' values, which are passed by name.
        describe: returns one sentence about the figure for the same values.
        controls: by name, see `Control`. Underscores in names are shown as spaces.
    """

    def __init__(self, draw: Callable[..., Figure], describe: Callable[..., str], **controls: Control) -> None:
        self._draw, self._describe = draw, describe
        self._controls = {name: _control(name, spec) for name, spec in controls.items()}
        self._image = w.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})
        self._sentence = w.HTML()
        super().__init__([*map(_row, self._controls.values()), self._image, self._sentence])
        for control in self._controls.values():
            control.observe(self._redraw, "value")
        self._redraw()

    @property
    def values(self) -> dict[str, Any]:
        """The present values of the controls."""
        return {name: control.value for name, control in self._controls.items()}

    def still(self) -> tuple[str, bytes]:
        """See `Still.still`: the picture at the present values."""
        return self._describe(**self.values), _png(self._draw(**self.values), DPI)

    def _redraw(self, *_: object) -> None:
        fig = self._draw(**self.values)
        self._image.width = str(round(fig.get_figwidth() * DPI))
        sentence = self._describe(**self.values)
        self._image.value, self._image.alt = _png(fig, 2 * DPI), sentence  # sharp on any screen
        self._sentence.value = f'<p role="status">{html.escape(sentence)}</p>'


class Guesses(Still):
    """A number field for each question. The button keeps the numbers in the work folder, see `guesses`.

    Args:
        names: questions of `guesses.QUESTIONS`; none: those of the source document's claims.
    """

    def __init__(self, *names: str) -> None:
        self._questions = [guesses.find(name) for name in names or [claim.name for claim in CLAIMS]]
        kept = guesses.load_guesses()
        self._fields = {q.name: _guess_field(q, kept.get(q.name)) for q in self._questions}
        self._said = w.HTML()
        button = w.Button(description="Keep my guess" if len(names) == 1 else "Keep my guesses", button_style="primary")
        button.on_click(self._keep)
        rows = [w.VBox([w.HTML(f"<b>{q.text}</b>"), self._fields[q.name]]) for q in self._questions]
        super().__init__([*rows, button, self._said])

    def still(self) -> tuple[str, bytes]:
        """See `Still.still`: the questions."""
        if len(self._questions) == 1:
            return f"Guess before you measure: {self._questions[0].text} (in {self._questions[0].unit})", b""
        lines = [f"{i}. {q.text} (in {q.unit}; notebook {q.lesson})" for i, q in enumerate(self._questions, 1)]
        return "\n".join([f"{len(lines)} questions. Guess before you measure:", *lines]), b""

    def _keep(self, _: object) -> None:
        read, said = {}, []
        for question in self._questions:
            text = self._fields[question.name].value
            try:
                if text.strip():
                    read[question.name] = guesses.read_guess(question, text)
            except InputError as error:
                said.append(f"{question.text} {error}.")
        guesses.keep_guesses(read)
        kept = f"Kept {len(read)} of {len(self._questions)}. Notebook 10 uses what you guess."
        self._said.value = f'<p role="status">{html.escape(" ".join([kept, *said]))}</p>'


def _png(fig: Figure, dpi: int) -> bytes:
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(fig)
    return file.getvalue()


def _control(name: str, spec: Control) -> Any:
    label: dict[str, Any] = {"description": name.replace("_", " "), "style": {"description_width": "9em"}}
    if isinstance(spec, bool):
        return w.Checkbox(value=spec, **label)
    if isinstance(spec, list):
        return w.Dropdown(options=spec, value=spec[0], **label)
    value, low, high = spec
    whole = all(isinstance(x, int) for x in spec)
    kind = w.BoundedIntText if whole else w.BoundedFloatText
    return kind(value=value, min=low, max=high, step=1 if whole else 0.1, layout={"width": "16em"}, **label)


def _row(control: Any) -> Any:
    """A control as it is shown: a number has a slider beside it.

    The slider is for the mouse. ipywidgets cannot give its handle a name that a screen reader could say, so the number
    field, which has a label, is the control.
    """
    if not isinstance(control, w.BoundedIntText | w.BoundedFloatText):
        return control
    kind = w.IntSlider if isinstance(control, w.BoundedIntText) else w.FloatSlider
    bounds = {"value": control.value, "min": control.min, "max": control.max, "step": control.step}
    slider = kind(readout=False, continuous_update=False, layout={"width": "20em"}, **bounds)
    w.link((control, "value"), (slider, "value"))
    return w.HBox([control, slider])


def _guess_field(question: guesses.Question, kept: float | None) -> Any:
    return w.Text(
        value="" if kept is None else f"{kept:g}",
        placeholder="your guess",
        description=question.unit,
        tooltip=question.text,  # a screen reader says it after the name, which is the unit
        style={"description_width": "9em"},
    )
