"""Who is named when a job stands still."""

from dataclasses import replace

from parallel import diagnosis
from parallel.heartbeat import DONE
from tests.parallel.test_heartbeat import BEAT

ME = replace(BEAT, rank=0, pid=BEAT.pid)
COMPUTING = replace(BEAT, waiting=False)


def ranks(beats):
    return [beat.rank for beat in beats]


def test_those_who_left_are_named_before_those_who_compute():
    left, computing = replace(BEAT, rank=1, ended=DONE), replace(COMPUTING, rank=2)
    assert ranks(diagnosis.late([ME, left, computing], ME)) == [1]


def test_those_who_compute_are_named_and_of_them_the_furthest_behind():
    behind = [replace(COMPUTING, rank=rank, step=step) for rank, step in ((1, 12), (2, 11), (3, 11))]
    assert ranks(diagnosis.late([ME, *behind, replace(BEAT, rank=4)], ME)) == [2, 3]


def test_those_who_wait_elsewhere_are_named():
    elsewhere = [replace(BEAT, rank=1, group="tp"), replace(BEAT, rank=2, operation="all_gather")]
    assert ranks(diagnosis.late([ME, *elsewhere, replace(BEAT, rank=3)], ME)) == [1, 2]


def test_the_last_to_come_is_named_when_all_wait_for_the_same():
    waits = [replace(BEAT, rank=rank, since_s=since) for rank, since in ((1, 9.0), (2, 0.5), (3, 9.0))]
    assert ranks(diagnosis.late([ME, *waits], ME)) == [2]


def test_a_heart_that_does_not_beat_between_two_readings_is_silent():
    early = {1: replace(BEAT, rank=1), 2: replace(BEAT, rank=2), 3: replace(BEAT, rank=3, ended=DONE)}
    late = early | {2: replace(BEAT, rank=2, beat=8), 4: replace(BEAT, rank=4)}
    assert ranks(diagnosis.silent(early, late)) == [1]


def test_long_lists_and_long_errors_are_cut():
    assert diagnosis.listed(["a"] * 10).endswith("a; and 2 more")
    assert diagnosis.first_line(RuntimeError("one\ntwo")) == "RuntimeError: one"
    assert len(diagnosis.first_line(RuntimeError("x" * 999))) == 200
