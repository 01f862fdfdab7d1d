"""Rounds: every contender once a round, the first one against itself."""

from kvlab.lab.timing import Timings, time_rounds


def test_every_contender_runs_once_a_round_and_the_first_one_twice() -> None:
    order: list[str] = []
    times = time_rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    rounds = [order[i : i + 3] for i in range(0, 9, 3)]  # one uncounted, two counted, each in an order of its own
    assert [sorted(names) for names in rounds] == [["a", "a", "b"]] * 3
    assert {name: len(s) for name, s in times.seconds.items()} == {"a": 2, "b": 2, "a again": 2}


def test_a_ratio_is_the_median_over_rounds_and_not_that_of_medians() -> None:
    times = Timings({"a": [1.0, 8.0, 3.0], "b": [0.5, 2.0, 3.0]}, 1.0)
    assert times.ratio("a", "b") == 2.0  # of 2, 4 and 1; the medians would give 1.5
    assert times.median_ms("a") == 3000


def test_noisy_is_more_than_ten_percent_off_in_either_direction() -> None:
    assert [Timings({}, ratio).noisy for ratio in (0.89, 0.91, 1.09, 1.11)] == [True, False, False, True]


def test_a_measurement_ends_early_after_a_whole_round() -> None:
    ran: list[str] = []
    times = time_rounds({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 100, enough=lambda: len(ran) > 7)
    assert (ran.count("a"), ran.count("b")) == (6, 3), "one round to warm up and two that count"
    assert {len(rounds) for rounds in times.seconds.values()} == {2}
