"""A flow picture: boxes and arrows, and in plain text a line that says the same."""

from kvlab.course.pictures import REQUEST, TIERED_REQUEST, Flow, Step

PNG = b"\x89PNG"


def test_a_flow_is_a_line_of_text_and_a_picture() -> None:
    flow = Flow([Step("a", "x < y"), Step("b"), Step("c")], columns=2)
    assert repr(flow) == "Figure: a -> b -> c"
    assert flow.png().startswith(PNG)
    assert flow.png() == flow.png() != Flow([Step("a"), Step("b"), Step("c")], columns=2).png()


def test_the_way_of_a_request_ends_where_the_next_begins() -> None:
    assert repr(Flow(REQUEST)).startswith("Figure: prompt -> block keys -> match -> load")
    assert [step.title for step in REQUEST if step.marked] == ["load", "prefill"]


def test_the_way_through_three_tiers_marks_what_runs_side_by_side() -> None:
    assert [step.title for step in TIERED_REQUEST if step.marked] == ["fetch", "prefill"]
