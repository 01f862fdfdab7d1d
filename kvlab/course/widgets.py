"""Interactive widgets: `Explorer` is a picture with controls, `Guesses` takes the reader's own numbers.

A widget's content must also be readable without the widget: before its cell has run, on GitHub and
in print. There the reader sees a sentence and a still picture, if any. The cell's output contains
both, and the notebook tests compare the sentence.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from kvlab.course.claims import CLAIMS, Claim
from kvlab.course.work import work_dir

Control = tuple[float, float, float] | list[Any] | bool
"""(value, low, high) for a slider, a list of choices (the first is the default), or a bool for a checkbox."""


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
        self._image = w.Image(format="png", layout={"max_width": "100%"})
        self._sentence = w.HTML()
        super().__init__([*self._controls.values(), self._image, self._sentence])
        for control in self._controls.values():
            control.observe(self._redraw, "value")
        self._redraw()

    @property
    def values(self) -> dict[str, Any]:
        """The present values of the controls."""
        return {name: control.value for name, control in self._controls.items()}

    def still(self) -> tuple[str, bytes]:
        """See `Still.still`: the picture at the present values."""
        return self._describe(**self.values), bytes(self._image.value)

    def _redraw(self, *_: object) -> None:
        fig = self._draw(**self.values)
        file = io.BytesIO()
        fig.savefig(file, format="png", dpi=80, metadata={"Software": None})
        plt.close(fig)
        sentence = self._describe(**self.values)
        self._image.value, self._image.alt = file.getvalue(), sentence
        self._sentence.value = f'<p role="status">{html.escape(sentence)}</p>'


class Guesses(Still):
    """One number field per claim of `CLAIMS`. The button writes the numbers to `guesses.json` in the work folder.

    Notebook 10 compares guesses, claims and measurements.
    """

    def __init__(self) -> None:
        kept = load_guesses()
        self._fields = {c.name: _guess_field(c, kept.get(c.name)) for c in CLAIMS}
        self._said = w.HTML()
        button = w.Button(description="Keep my guesses", button_style="primary")
        button.on_click(self._keep)
        rows = [w.VBox([w.HTML(f"<b>{c.question}</b>"), self._fields[c.name]]) for c in CLAIMS]
        super().__init__([*rows, button, self._said])

    def still(self) -> tuple[str, bytes]:
        """See `Still.still`: the questions."""
        lines = [f"{i}. {c.question} (in {c.unit})" for i, c in enumerate(CLAIMS, 1)]
        return "\n".join([f"{len(CLAIMS)} questions. Guess before you measure:", *lines]), b""

    def _keep(self, _: object) -> None:
        guesses, unread = {}, []
        for claim in CLAIMS:
            text = self._fields[claim.name].value.strip().rstrip("%x")
            try:
                if text:
                    guesses[claim.name] = float(text)
            except ValueError:
                unread.append(text)
        path = work_dir() / "guesses.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(guesses, indent=2) + "\n", "utf-8")
        said = f"Kept {len(guesses)} of {len(CLAIMS)} guesses. Notebook 10 uses them."
        said += f" Not a number: {', '.join(unread)}." if unread else ""
        self._said.value = f'<p role="status">{html.escape(said)}</p>'


def load_guesses() -> Mapping[str, float]:
    """The saved guesses by claim; empty if there is no file or its content is not valid."""
    try:
        kept = json.loads((work_dir() / "guesses.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {k: float(v) for k, v in kept.items() if isinstance(v, int | float)}


def _control(name: str, spec: Control) -> Any:
    label: dict[str, Any] = {"description": name.replace("_", " "), "style": {"description_width": "9em"}}
    if isinstance(spec, bool):
        return w.Checkbox(value=spec, **label)
    if isinstance(spec, list):
        return w.Dropdown(options=spec, value=spec[0], **label)
    value, low, high = spec
    kind = w.IntSlider if all(isinstance(x, int) for x in spec) else w.FloatSlider
    return kind(value=value, min=low, max=high, continuous_update=False, layout={"width": "32em"}, **label)


def _guess_field(claim: Claim, kept: float | None) -> Any:
    return w.Text(
        value="" if kept is None else f"{kept:g}",
        placeholder="your guess",
        description=claim.unit,
        style={"description_width": "9em"},
    )
