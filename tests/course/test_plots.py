"""Plots: the caption is printed below them."""

import pytest

from kvlab.course import plots


def test_a_plot_prints_its_caption(capsys: pytest.CaptureFixture[str]) -> None:
    plots.use_style()
    fig, _ = plots.new_figure("t")
    plots.show(fig, "hit rate rises.")
    assert capsys.readouterr().out.endswith("Figure: hit rate rises.\n")
