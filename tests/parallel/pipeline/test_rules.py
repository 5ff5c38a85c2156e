"""What each schedule asks for, and where its stages lie."""

import subprocess
import sys

import pytest

from parallel.config import Schedule
from parallel.pipeline.rules import num_stages, schedule_problems, stage_to_rank


def problems(name: str, *, pp: int = 4, chunks: int = 2, num_microbatches: int = 8) -> list[str]:
    return schedule_problems(Schedule(name), pp=pp, chunks=chunks, num_microbatches=num_microbatches)


def test_places() -> None:
    assert stage_to_rank(Schedule("1f1b"), pp=3, chunks=2) == (0, 1, 2)
    assert stage_to_rank(Schedule("interleaved"), pp=2, chunks=3) == (0, 1, 0, 1, 0, 1)
    assert stage_to_rank(Schedule("dualpipev"), pp=3, chunks=5) == (0, 1, 2, 2, 1, 0)
    assert [num_stages(s, pp=4, chunks=3) for s in Schedule] == [4, 4, 12, 12, 8, 8]


@pytest.mark.parametrize("name", list(Schedule))
def test_eight_microbatches_on_four_ranks_suit_everybody(name: str) -> None:
    assert problems(name) == []


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zbv", "dualpipev"])
def test_others_than_the_interleaved_take_any_number_of_microbatches(name: str) -> None:
    assert [problems(name, num_microbatches=number) for number in (1, 3, 7, 9)] == [[]] * 4
    (problem,) = problems(name, num_microbatches=0)
    assert problem.endswith("needs at least 1; the nearest number is 1")


@pytest.mark.parametrize(("asked", "nearest"), [(9, 8), (11, 10), (13, 12), (17, 16), (23, 24)])
def test_interleaved_rounds_are_of_equal_size(asked: int, nearest: int) -> None:
    for name in ("interleaved", "interleaved_zb"):
        (problem,) = problems(name, num_microbatches=asked)
        assert problem.startswith(f"{asked} microbatches: schedule={name} with pp=4 needs")
        assert problem.endswith(f"the nearest number is {nearest}")
        assert problems(name, num_microbatches=nearest) == []


def test_all_problems_at_once() -> None:
    found = problems("interleaved", pp=2, chunks=1, num_microbatches=0)
    assert len(found) == 2
    assert "chunks=1: schedule=interleaved needs at least 2 stages per rank; use chunks=2" in found[0]
    assert found[1].endswith("the nearest number is 1")
    assert problems("gpipe", pp=0) == ["pp=0 must be at least 1; use 1"]


def test_rules_and_clock_need_no_torch() -> None:
    code = (
        "import sys, parallel.pipeline.rules, parallel.pipeline.table, parallel.pipeline.bubble\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
