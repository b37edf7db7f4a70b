"""Timeline: overlapping work counts once, and gaps belong to a step only if both of their ends do."""

from autodeploy.bench.profile.timeline import Span, Timeline, timeline


def test_gaps_within_and_between_steps() -> None:
    spans = [
        Span(0.0, 2.0, 0),
        Span(1.0, 3.0, 0),  # beside the one before, on another stream
        Span(4.0, 5.0, 0),
        Span(6.0, 7.0, None),  # sampling
        Span(7.5, 9.0, 1),
        Span(9.0, 10.0, 1),
    ]
    expected = Timeline(steps=2, seconds=10.0, busy_seconds=7.5, within_seconds=1.0, between_seconds=1.5)
    assert timeline(spans[::-1]) == expected
    assert (expected.within_share, expected.between_share) == (0.1, 0.15)


def test_what_is_before_the_first_step_and_after_the_last_does_not_count() -> None:
    spans = [Span(0.0, 1.0, None), Span(5.0, 6.0, 3), Span(6.0, 7.0, 4), Span(9.0, 10.0, None)]
    assert timeline(spans) == Timeline(steps=2, seconds=2.0, busy_seconds=2.0, within_seconds=0.0, between_seconds=0.0)


def test_short_work_under_a_long_one_leaves_no_gap() -> None:
    found = timeline([Span(0.0, 10.0, 0), Span(1.0, 2.0, 1), Span(12.0, 13.0, 1)])
    assert found is not None
    assert (found.busy_seconds, found.within_seconds, found.between_seconds) == (11.0, 0.0, 2.0)


def test_no_step_no_timeline() -> None:
    assert timeline([Span(0.0, 1.0, None)]) is None
