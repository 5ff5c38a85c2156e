"""The orders written without torch against the tables that run."""

import pytest

from parallel.config import Schedule
from parallel.pipeline.actions import action_table
from parallel.pipeline.orders import pass_table
from parallel.pipeline.rules import INTERLEAVED, schedule_problems

CHUNKS = {True: (2, 3), False: (2,)}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", Schedule)
def test_orders_are_those_of_the_tables_that_run(schedule, overlap):
    compared = 0
    for pp in (1, 2, 3, 4):
        for chunks in CHUNKS[schedule in INTERLEAVED]:
            for num_microbatches in (*range(1, 10), 12, 17):
                sizes = {"pp": pp, "chunks": chunks, "num_microbatches": num_microbatches}
                if schedule_problems(schedule, **sizes):
                    continue
                runs = action_table(schedule, **sizes, overlap=overlap)
                table = pass_table(schedule, **sizes, overlap=overlap)
                compared += 1
                assert table.stage_to_rank == runs.stage_to_rank
                for rank in range(pp):
                    passes = [action for action in runs.actions[rank] if action.passes]
                    assert list(table.actions[rank]) == passes, (sizes, rank)
    assert compared > 12


def test_the_published_pipeline_has_the_same_order():
    sizes = {"pp": 16, "chunks": 2, "num_microbatches": 120}
    runs, table = action_table(Schedule.dualpipev, **sizes), pass_table(Schedule.dualpipev, **sizes)
    for rank in range(16):
        assert list(table.passes(rank)) == list(runs.passes(rank))


def test_orders_that_have_no_other_truth():
    """Those of which torch has no right table; actions.py takes them from here."""
    sizes = {"pp": 3, "chunks": 1, "num_microbatches": 4}

    def written(schedule: str) -> list[str]:
        return [" ".join(map(str, order)) for order in pass_table(Schedule(schedule), **sizes).actions]

    assert written("gpipe") == [f"{r}F0 {r}F1 {r}F2 {r}F3 {r}B0 {r}B1 {r}B2 {r}B3" for r in range(3)]
    assert written("1f1b") == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_a_step_that_breaks_a_rule_is_refused():
    with pytest.raises(ValueError, match="chunks=1"):
        pass_table(Schedule.interleaved, pp=2, chunks=1, num_microbatches=4)
