"""Every table that is legal is complete, in order, and free of deadlocks; no process is needed to know.

The checks know nothing of how torch makes tables: they follow data from stage to stage.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator

import pytest

from parallel.config import Schedule
from parallel.pipeline.actions import action_table
from parallel.pipeline.rules import num_stages, schedule_problems, stage_to_rank
from parallel.pipeline.table import Action, ActionKind, ActionTable

SEND = {ActionKind.SEND_FORWARD: 1, ActionKind.SEND_BACKWARD: -1}
RECEIVE = {ActionKind.RECEIVE_FORWARD: 1, ActionKind.RECEIVE_BACKWARD: -1}
INPUT_GRADIENT = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
WEIGHT_GRADIENT = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)


def tables(schedule: Schedule) -> Iterator[tuple[ActionTable, int]]:
    """Yield every legal table of up to four ranks with its number of microbatches."""
    for pp in (1, 2, 3, 4):
        for count in (1, 2, 3, 4, 5, 6, 8, 10, 12):
            for chunks in (2, 3) if schedule in (Schedule.interleaved, Schedule.interleaved_zb) else (2,):
                sizes = {"pp": pp, "chunks": chunks, "num_microbatches": count}
                if schedule_problems(schedule, **sizes):
                    with pytest.raises(ValueError, match="microbatches"):
                        action_table(schedule, **sizes)
                    continue
                table = action_table(schedule, **sizes)
                assert table.stage_to_rank == stage_to_rank(schedule, pp=pp, chunks=chunks)
                assert table.num_stages == num_stages(schedule, pp=pp, chunks=chunks)
                yield table, count
                if schedule is Schedule.dualpipev:
                    yield action_table(schedule, **sizes, overlap=False), count


@pytest.mark.parametrize("schedule", Schedule)
def test_tables_are_complete_and_can_be_run(schedule: Schedule) -> None:
    checked = 0
    for table, count in tables(schedule):
        check_passes(table, count)
        check_reductions(table, count)
        check_transfers_match(table)
        run_buffered(table)
        run_blocking(table)
        checked += 1
    assert checked >= 16


def check_passes(table: ActionTable, count: int) -> None:
    """Each rank: its stages only; F once, then one B, or one I and after it one W."""
    for rank in range(len(table.actions)):
        place = {(part.kind, part.stage, part.microbatch): i for i, part in enumerate(table.passes(rank))}
        own = {(s, m) for s, r in enumerate(table.stage_to_rank) if r == rank for m in range(count)}
        kinds = Counter((part.stage, part.microbatch, part.kind) for part in table.passes(rank))
        assert {(stage, microbatch) for stage, microbatch, _ in kinds} == own
        assert set(kinds.values()) == {1}
        for key in own:
            names = [kind for kind in ActionKind if (*key, kind) in kinds]
            assert names in (
                [ActionKind.FORWARD, ActionKind.BACKWARD],
                [ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT],
            )
            assert [place[kind, *key] for kind in names] == sorted(place[kind, *key] for kind in names)


def check_reductions(table: ActionTable, count: int) -> None:
    """REDUCE_GRAD once per stage, when all weight gradients of the stage are there."""
    for rank, actions in enumerate(table.actions):
        done: Counter[int] = Counter()
        reduced = []
        for action in actions:
            done.update(part.stage for part in action.passes if part.kind in WEIGHT_GRADIENT)
            if action.kind is ActionKind.REDUCE_GRAD:
                assert done[action.stage] == count
                reduced.append(action.stage)
        assert sorted(reduced) == [s for s, r in enumerate(table.stage_to_rank) if r == rank]


def peer(table: ActionTable, action: Action) -> int:
    step = SEND[action.kind] if action.kind in SEND else -RECEIVE[action.kind]
    return table.stage_to_rank[action.stage + step]


def message(action: Action) -> tuple[int, int, int]:
    """Name what travels by way, receiving stage and microbatch, alike on both sides."""
    if action.kind in SEND:
        return SEND[action.kind], action.stage + SEND[action.kind], action.microbatch
    return RECEIVE[action.kind], action.stage, action.microbatch


def check_transfers_match(table: ActionTable) -> None:
    """Between two ranks, messages are received in the order in which they are sent; none is to oneself."""
    sent, received = defaultdict(list), defaultdict(list)
    for rank, actions in enumerate(table.actions):
        for action in actions:
            if action.kind in SEND:
                sent[rank, peer(table, action)].append(message(action))
            elif action.kind in RECEIVE:
                received[peer(table, action), rank].append(message(action))
    assert sent == received
    assert all(source != to for source, to in sent)


def inputs(table: ActionTable, part: Action) -> tuple[int, int, int] | None:
    """Return the message or local result that a pass starts from."""
    if part.kind is ActionKind.FORWARD and part.stage > 0:
        return 1, part.stage, part.microbatch
    if part.kind in INPUT_GRADIENT and part.stage < table.num_stages - 1:
        return -1, part.stage, part.microbatch
    return None


def result(part: Action) -> tuple[int, int, int] | None:
    if part.kind is ActionKind.FORWARD:
        return 1, part.stage + 1, part.microbatch
    return (-1, part.stage - 1, part.microbatch) if part.kind in INPUT_GRADIENT else None


def run_buffered(table: ActionTable) -> None:
    """Sends never wait, a posted receive is waited for by the pass that needs it: as gloo and NCCL run it."""
    queues = [deque(actions) for actions in table.actions]
    posted: list[set[tuple[int, int, int]]] = [set() for _ in queues]
    here: list[set[tuple[int, int, int] | None]] = [{None} for _ in queues]
    under_way: set[tuple[int, int, int]] = set()
    while any(queues):
        before = sum(map(len, queues))
        for rank, queue in enumerate(queues):
            while queue:
                action = queue[0]
                if action.kind in SEND:
                    assert message(action) in here[rank], action
                    under_way.add(message(action))
                elif action.kind in RECEIVE:
                    posted[rank].add(message(action))
                else:
                    here[rank] |= posted[rank] & under_way
                    if not all(inputs(table, part) in here[rank] for part in action.passes):
                        break
                    here[rank] |= {result(part) for part in action.passes}
                queue.popleft()
        assert sum(map(len, queues)) < before, f"deadlock: {[str(queue[0]) for queue in queues if queue]}"


def run_blocking(table: ActionTable) -> None:
    """A send and its receive happen together, and each holds up its rank until then: no buffers at all."""
    queues = [deque(actions) for actions in table.actions]
    here: list[set[tuple[int, int, int] | None]] = [{None} for _ in queues]
    while any(queues):
        before = sum(map(len, queues))
        for rank, queue in enumerate(queues):
            while queue:
                action = queue[0]
                if action.kind in RECEIVE:
                    break  # its sender takes it away
                if action.kind in SEND:
                    other = queues[peer(table, action)]
                    if not other or other[0].kind not in RECEIVE or message(other[0]) != message(action):
                        break
                    here[peer(table, action)].add(message(other.popleft()))
                assert all(inputs(table, part) in here[rank] for part in action.passes), action
                here[rank] |= {result(part) for part in action.passes}
                queue.popleft()
        assert sum(map(len, queues)) < before, f"deadlock: {[str(queue[0]) for queue in queues if queue]}"


def test_dualpipev_overlaps_most_of_its_passes() -> None:
    table = action_table(Schedule.dualpipev, pp=2, chunks=2, num_microbatches=8)
    overlaps = [action for action in table.actions[0] if action.kind is ActionKind.OVERLAP]
    assert len(overlaps) == 11
    assert all([part.kind for part in o.parts] == [ActionKind.FORWARD, ActionKind.BACKWARD] for o in overlaps)
    assert str(overlaps[0]) == "(0F3;3B1)OVERLAP_F_B"
    apart = action_table(Schedule.dualpipev, pp=2, chunks=2, num_microbatches=8, overlap=False)
    assert list(apart.passes(0)) == list(table.passes(0))
    assert ActionKind.OVERLAP not in {action.kind for action in apart.actions[0]}


def test_1f1b_by_hand() -> None:
    table = action_table(Schedule("1f1b"), pp=2, chunks=2, num_microbatches=3)
    assert " ".join(map(str, table.passes(0))) == "0F0 0F1 0B0 0F2 0B1 0B2"
    assert " ".join(map(str, table.passes(1))) == "1F0 1B0 1F1 1B1 1F2 1B2"
    assert " ".join(map(str, table.actions[1])) == (
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1RECV_F2 1B1 1SEND_B1 1F2 1B2 1SEND_B2 1REDUCE_GRAD"
    )


def test_gpipe_runs_all_forwards_first() -> None:
    table = action_table(Schedule.gpipe, pp=2, chunks=2, num_microbatches=3)
    for rank in range(2):
        assert [part.kind for part in table.passes(rank)] == [ActionKind.FORWARD] * 3 + [
            ActionKind.BACKWARD
        ] * 3


@pytest.mark.parametrize(("name", "most"), [("gpipe", 8), ("1f1b", 4)])
def test_1f1b_bounds_the_microbatches_under_way(name: str, most: int) -> None:
    table = action_table(Schedule(name), pp=4, chunks=2, num_microbatches=8)
    under_way = [0]
    for part in table.passes(0):
        under_way.append(under_way[-1] + (1 if part.kind is ActionKind.FORWARD else -1))
    assert max(under_way) == most


def test_the_checks_notice_a_broken_table() -> None:
    good = action_table(Schedule.zbv, pp=2, chunks=2, num_microbatches=4)
    actions = list(map(list, good.actions))
    first, second = sends_of(actions[0])[:2]
    actions[0][first], actions[0][second] = actions[0][second], actions[0][first]
    swapped = ActionTable(tuple(map(tuple, actions)), good.stage_to_rank)
    with pytest.raises(AssertionError):
        check_transfers_match(swapped)
    with pytest.raises(AssertionError):
        run_buffered(swapped)
    missing = ActionTable(tuple(rank[:-1] for rank in good.actions), good.stage_to_rank)
    with pytest.raises(AssertionError):
        check_reductions(missing, 4)


def sends_of(actions: list[Action]) -> list[int]:
    return [i for i, action in enumerate(actions) if action.kind in SEND]
