"""The takeaway box of a notebook."""

from __future__ import annotations

from IPython.display import Markdown


def takeaway(sentence: str) -> Markdown:
    """The box at the end of a section. The number in its sentence comes from the cell above."""
    return Markdown(f"> **Takeaway.** {sentence}")  # type: ignore[no-untyped-call]
