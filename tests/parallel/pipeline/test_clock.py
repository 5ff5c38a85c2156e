"""Tables on a clock with unequal stages, and what is held at once, against slower and plainer ways."""

import pytest

from parallel.config import Schedule
from parallel.pipeline.clock import Slot, cached_program, program_of, run, slot_of
from parallel.pipeline.in_flight import held_at_once, peak_bytes
from parallel.pipeline.orders import pass_table
from parallel.pipeline.table import Action, ActionKind, ActionTable

SIZES = {"pp": 4, "chunks": 2, "num_microbatches": 12}


def seconds(slot: Slot, scale: list[float]) -> float:
    """A backward pass takes 2 + 1, a joined pair 3.5 of the mean of its stages."""
    kind, stage, other = slot
    if kind is ActionKind.OVERLAP:
        return 3.5 * (scale[stage] + scale[other]) / 2
    units = {ActionKind.FORWARD: 1, ActionKind.BACKWARD: 3, ActionKind.BACKWARD_INPUT: 2}
    return units.get(kind, 1) * scale[stage]


def relaxed(table: ActionTable, scale: list[float], transfer: float) -> float:
    """Return the makespan by raising ends until no rule is broken any more."""
    units = [[action for action in actions if action.passes] for actions in table.actions]
    ends: dict[tuple[str, int, int], float] = {}
    made = {ActionKind.FORWARD: "F", ActionKind.BACKWARD_WEIGHT: "W"}
    changed = True
    while changed:
        changed = False
        for queue in units:
            clock = 0.0
            for action in queue:
                for part in action.passes:
                    for need, stage in needs(part, table.num_stages):
                        crossing = transfer if stage != part.stage else 0.0
                        if table.stage_to_rank[stage] == table.stage_to_rank[part.stage]:
                            crossing = 0.0
                        clock = max(clock, ends.get((need, stage, part.microbatch), 0.0) + crossing)
                clock += seconds(slot_of(action), scale)
                for part in action.passes:
                    key = (made.get(part.kind, "I"), part.stage, part.microbatch)
                    changed = changed or ends.get(key) != clock
                    ends[key] = clock
    return max(ends.values())


def needs(part: Action, num_stages: int) -> list[tuple[str, int]]:
    if part.kind is ActionKind.FORWARD:
        return [("F", part.stage - 1)] if part.stage else []
    if part.kind is ActionKind.BACKWARD_WEIGHT:
        return [("I", part.stage)]
    return [("F", part.stage)] + ([("I", part.stage + 1)] if part.stage < num_stages - 1 else [])


@pytest.mark.parametrize("schedule", Schedule)
def test_unequal_stages_and_transfers(schedule):
    table = pass_table(schedule, **SIZES)
    program = program_of(table)
    assert program == cached_program(schedule, **SIZES)
    scale = [1 + 0.1 * (stage * 7 % 5) for stage in range(table.num_stages)]
    ranks = table.stage_to_rank
    transfers = [0.0 if ranks[i] == ranks[i + 1] else 0.25 for i in range(table.num_stages - 1)]
    result = run(program, {slot: seconds(slot, scale) for slot in program.slots}, transfers=transfers)
    assert result.makespan == pytest.approx(relaxed(table, scale, 0.25), rel=1e-12)
    busy = [sum(seconds(slot_of(action), scale) for action in actions) for actions in table.actions]
    assert result.busy == pytest.approx(busy, rel=1e-12)
    assert result.idle == pytest.approx([result.makespan - each for each in busy], rel=1e-9)
    assert result.bubble == pytest.approx(1 - sum(busy) / (4 * result.makespan), rel=1e-9)


def test_ranks_that_wait_for_each_other_are_found():
    backward_first = (Action(ActionKind.BACKWARD, 0, 0), Action(ActionKind.FORWARD, 0, 0))
    with pytest.raises(ValueError, match="deadlock at rank 0: 0B0"):
        program_of(ActionTable((backward_first,), (0,)))


def test_1f1b_holds_as_many_microbatches_as_later_stages():
    held = held_at_once(Schedule["1f1b"], **SIZES)
    assert held == tuple((((count, 0),),) for count in (4, 3, 2, 1))
    assert held_at_once(Schedule.gpipe, **SIZES) == ((((12, 0),),),) * 4


def test_a_v_holds_one_more_than_its_stages_between_both_stages_of_a_rank():
    """2 pp + 1 in all, whatever the rank: what makes DualPipeV's memory even (arXiv 2412.19437, table 2)."""
    held = held_at_once(Schedule.dualpipev, **SIZES)
    most = [max(sum(map(sum, stages)) for stages in of_rank) for of_rank in held]
    assert most == [9, 9, 9, 9]
    assert peak_bytes(held[0], [10.0, 1.0], [10.0, 1.0]) == 8 * 10 + 1


def test_ranks_that_put_off_more_are_told_apart():
    """By the rank's number, and the one that just came: what makes later ranks fuller in BF16."""

    def latest(schedule: Schedule) -> list[int]:
        held = held_at_once(schedule, **SIZES)
        return [max(sum(late for _, late in stages) for stages in of_rank) for of_rank in held]

    assert latest(Schedule.interleaved_zb) == [1, 2, 3, 4]
    assert latest(Schedule.dualpipev) == [1, 2, 3, 4]
    assert latest(Schedule["1f1b"]) == [0, 0, 0, 0]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("share", [0.3, 1.0, 2.5])
def test_peaks_are_those_of_going_through_the_table(schedule, share):
    """Whether more or less waits for weight gradients than waited for the backward pass: share of it."""
    table = pass_table(schedule, **SIZES)
    held = held_at_once(schedule, **SIZES)
    for rank in range(4):
        stages = [stage for stage, owner in enumerate(table.stage_to_rank) if owner == rank]
        whole = {stage: 1.0 + 3 * i for i, stage in enumerate(stages)}
        put_off = {stage: share * size for stage, size in whole.items()}
        now, most = 0.0, 0.0
        for part in table.passes(rank):
            waits, late = whole[part.stage], put_off[part.stage]
            now += {
                ActionKind.FORWARD: waits,
                ActionKind.BACKWARD: -waits,
                ActionKind.BACKWARD_INPUT: late - waits,
                ActionKind.BACKWARD_WEIGHT: -late,
            }[part.kind]
            most = max(most, now)
        assert now == pytest.approx(0)
        assert peak_bytes(held[rank], list(whole.values()), list(put_off.values())) == pytest.approx(most)
