"""Plots: the caption is printed below them."""

import pytest

from kvlab.course import plots


def test_a_plot_prints_its_caption(capsys: pytest.CaptureFixture[str]) -> None:
    plots.use_style()
    fig, _ = plots.new_figure("t")
    plots.show(fig, "hit rate rises.")
    assert capsys.readouterr().out.endswith("Figure: hit rate rises.\n")


def test_whole_plots_are_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    plots.lines("t", [1, 2], {"a": [1, 2], "b": [2, 1]}, "x", "y", "they cross.")
    plots.bars("t", {"a": 3, "b": 1}, "bytes", "a is longer.")
    plots.groups("t", ["x", "y"], {"a": [1, 2], "b": [2, 1]}, "ms", "both are short.", number=".0f")
    said = capsys.readouterr().out.splitlines()
    captions = [line for line in said if line.startswith("Figure: ")]
    assert captions == ["Figure: they cross.", "Figure: a is longer.", "Figure: both are short."]
