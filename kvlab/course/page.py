"""What a notebook page shows besides plots and pictures: the takeaway box."""

from __future__ import annotations

from IPython.display import Markdown


def takeaway(sentence: str) -> Markdown:
    """The box that ends a section: one sentence whose number the cell above computed."""
    return Markdown(f"> **Takeaway.** {sentence}")  # type: ignore[no-untyped-call]
