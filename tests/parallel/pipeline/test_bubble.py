"""The clock agrees with figures measured elsewhere and with the closed formulas where these hold."""

import functools

import pytest

from parallel.config import Schedule
from parallel.pipeline.actions import action_table
from parallel.pipeline.bubble import BubbleRow, Costs, bubble_row, bubble_table, idle_formula, simulate
from parallel.pipeline.rules import schedule_problems
from parallel.pipeline.table import Action, ActionKind, ActionTable

EQUAL = Costs()


table_of = functools.cache(action_table)


def row(name: str, pp: int, num_microbatches: int, costs: Costs = EQUAL, chunks: int = 2) -> BubbleRow:
    schedule = Schedule(name)
    table = table_of(schedule, pp=pp, chunks=chunks, num_microbatches=num_microbatches)
    return bubble_row(table, schedule, num_microbatches=num_microbatches, costs=costs)


# idle fractions of torch's tables with F = I = W, by another simulator
MEASURED = {
    (4, 8): {"gpipe": 0.273, "interleaved": 0.158, "interleaved_zb": 0.059, "zbv": 0.059, "dualpipev": 0.059},
    (4, 16): {
        "gpipe": 0.158,
        "interleaved": 0.086,
        "interleaved_zb": 0.030,
        "zbv": 0.030,
        "dualpipev": 0.030,
    },
    (8, 16): {
        "gpipe": 0.304,
        "interleaved": 0.179,
        "interleaved_zb": 0.068,
        "zbv": 0.068,
        "dualpipev": 0.068,
    },
    (8, 20): {
        "gpipe": 0.259,
        "interleaved": 0.149,
        "interleaved_zb": 0.055,
        "zbv": 0.055,
        "dualpipev": 0.055,
    },
}


@pytest.mark.parametrize(("pp", "num_microbatches"), MEASURED)
def test_bubbles_measured_elsewhere(pp: int, num_microbatches: int) -> None:
    for name, expected in MEASURED[pp, num_microbatches].items():
        assert round(row(name, pp, num_microbatches).bubble, 3) == expected, name
    assert row("1f1b", pp, num_microbatches).bubble == row("gpipe", pp, num_microbatches).bubble


COSTS = [
    EQUAL,
    Costs(forward=1.0, backward_input=1.25, backward_weight=0.75),
    Costs(forward=2.0, backward_input=1.0, backward_weight=1.0),
    Costs(backward_input=1.5, backward_weight=1.25),
    *(Costs(overlapped=overlapped) for overlapped in (2.0, 2.25, 2.5, 3.0)),
]


@pytest.mark.parametrize("schedule", Schedule)
def test_formulas_hold_where_they_are_given(schedule: Schedule) -> None:
    compared = 0
    for costs in COSTS:
        for pp in (2, 3, 4):
            for count in (4, 8, 9, 12, 20):
                if schedule_problems(schedule, pp=pp, chunks=2, num_microbatches=count):
                    continue
                result = row(schedule, pp, count, costs)
                if result.formula is not None:
                    assert result.idle == pytest.approx(result.formula), result
                    compared += 1
    assert compared >= 12


def test_known_fractions() -> None:
    """(P - 1) / (m + P - 1), and with v stages per rank (P - 1) / (v m + P - 1)."""
    assert row("1f1b", 4, 12).bubble == pytest.approx(3 / 15)
    assert row("interleaved", 4, 12, chunks=3).bubble == pytest.approx(3 / (3 * 12 + 3))


def test_the_rank_that_overlaps_most_idles_as_deepseek_say() -> None:
    """(PP/2 - 1)(F&B + B - 3W), with PP = 2 pp; stages of unequal cost get no formula."""
    result = row("dualpipev", 4, 16, Costs(overlapped=2.5))
    assert result.formula == pytest.approx(3 * (2.5 + 2 - 3))
    assert result.idle == pytest.approx(result.formula)
    assert (
        row("dualpipev", 4, 16, Costs(backward_input=1.5, backward_weight=0.5, overlapped=2.5)).formula
        is None
    )


def test_no_formula_where_none_holds() -> None:
    shape = {"pp": 4, "num_microbatches": 10}
    assert idle_formula(Schedule.interleaved, costs=EQUAL, **shape) is None  # 10 is no multiple of 4
    assert idle_formula(Schedule.zbv, costs=Costs(backward_weight=2.0), **shape) is None
    assert (
        idle_formula(Schedule.interleaved_zb, pp=4, num_microbatches=8, costs=Costs(backward_weight=2.0))
        is None
    )


def test_overlapping_shortens_the_step() -> None:
    apart, together = row("dualpipev", 4, 40), row("dualpipev", 4, 40, Costs(overlapped=2.0))
    assert together.makespan < 0.72 * apart.makespan


def test_a_deadlock_is_named() -> None:
    forward, backward = Action(ActionKind.FORWARD, 0, 0), Action(ActionKind.BACKWARD, 0, 0)
    with pytest.raises(ValueError, match="deadlock at rank 0: 0B0"):
        simulate(ActionTable(((backward, forward),), (0,)), EQUAL)


def test_the_table_prints_formula_beside_bubble() -> None:
    lines = bubble_table([row("gpipe", 4, 8), row("interleaved", 4, 10)]).splitlines()
    assert lines[0].split() == ["schedule", "pp", "microbatches", "bubble", "idle", "formula"]
    assert lines[1].split() == ["gpipe", "4", "8", "0.273", "9.00", "9.00"]
    assert lines[2].split() == ["interleaved", "4", "10", "0.130", "9.00", "-"]
