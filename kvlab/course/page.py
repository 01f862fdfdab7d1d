"""What a notebook shows beside its results: the takeaway box, and whether the machine was quiet."""

from __future__ import annotations

from IPython.display import Markdown

from kvlab.lab.streams import accept_any_text
from kvlab.lab.timing import NOISY_BEYOND, UNSTEADY_BEYOND, Timings

BUSY = " *(Measured on a busy machine: do not trust the times.)*"


def takeaway(sentence: str, *measured: Timings) -> Markdown:
    """The box at the end of a section. The number in its sentence comes from the cell above.

    Args:
        measured: where the times in the sentence come from. The box says if the machine was busy then; strict runs
            of the notebooks do not compare that.
    """
    busy = any(t.noisy or t.unsteady for t in measured)
    return Markdown(f"> **Takeaway.** {sentence}{BUSY if busy else ''}")  # type: ignore[no-untyped-call]


def machine_check(affected: str, *measured: Timings) -> None:
    """Print whether the machine was quiet during measurements.

    The printed line begins with "machine:". Strict runs of the notebooks do not compare such lines.

    Args:
        affected: what not to trust if the machine was busy, for example "the table and the plot above".
        measured: the measurements. The worst of them decides.
    """
    accept_any_text()
    apart = max(abs(t.aa_ratio - 1) for t in measured)
    swing = max(t.swing for t in measured)
    if not any(t.noisy or t.unsteady for t in measured):
        print(f"machine: quiet (the same work measured twice differs by {apart:.0%})")
        return
    print(
        f"machine: BUSY. The same work measured twice differs by {apart:.0%} (quiet: up to {NOISY_BEYOND:.0%}), "
        f"and the slower rounds took {swing:.1f} times as long as the faster ones (quiet: up to {UNSTEADY_BEYOND}). "
        f"Do not trust {affected}: "
        "close other programs and run the cell that measures again."
    )
