"""The search against brute force, and its candidates against the rules that refuse layouts."""

from dataclasses import replace

import pytest

from model.config import Recompute
from parallel.candidates import candidates
from parallel.checks import layout_of, layout_problems
from parallel.config import ParallelConfig, Schedule
from parallel.floors import floor_seconds
from parallel.placement import count_stages
from parallel.planner import Plan
from parallel.search import search
from tests.parallel.planned import CARD, MODEL, task

BASE = ParallelConfig()
FEW = frozenset({"recompute", "microbatch_size"})


@pytest.mark.parametrize("world_size", [1, 6, 8])
def test_every_candidate_is_legal(world_size):
    asked = task(world_size=world_size, batch_sizes=(24, 48))
    found = list(candidates(asked, base=BASE, fixed=FEW))
    assert len(found) == len({repr(each) for each in found}) > 0
    for parallel in found:
        problems = layout_problems(
            parallel,
            model=MODEL,
            world_size=world_size,
            batch_sizes=asked.batch_sizes,
            seq_len=asked.seq_len,
            path="parallel",
        )
        assert problems == []


def test_candidates_are_all_that_the_rules_allow():
    asked = task(world_size=4, batch_sizes=(12,))
    wanted = {
        (pp, tp, cp, ep)
        for pp in (1, 2, 4)
        for tp in (1, 2, 4)
        for cp in (1, 2, 4)
        for ep in (1, 2, 4)
        if not layout_problems(
            replace(BASE, pp=pp, tp=tp, cp=cp, ep=ep, node_size=4),
            model=MODEL,
            world_size=4,
            batch_sizes=(12,),
            seq_len=64,
            path="parallel",
        )
    }
    assert {(c.pp, c.tp, c.cp, c.ep) for c in candidates(asked, base=BASE)} == wanted


def test_fixed_fields_are_held():
    base = replace(BASE, pp=2, schedule=Schedule.zbv, recompute=Recompute.core)
    fixed = frozenset({"pp", "schedule", "recompute"})
    found = list(candidates(task(), base=base, fixed=fixed))
    assert found
    assert {(c.pp, c.schedule, c.recompute) for c in found} == {(2, Schedule.zbv, Recompute.core)}
    assert len({c.ep for c in found}) > 1


@pytest.mark.parametrize("by_hand", [[3, 3], [1, 2, 2, 1], [0, 3, 3, 0]])
def test_a_cut_by_hand_is_held_where_it_fits(by_hand):
    assert MODEL.num_layers == sum(by_hand)
    base = replace(BASE, layers_per_stage=by_hand)
    found = list(candidates(task(), base=base, fixed=frozenset({"layers_per_stage"})))
    assert {count_stages(each) for each in found} == {len(by_hand)}
    assert all(each.layers_per_stage == by_hand for each in found)
    assert all(Plan(task(), each).peak_memory > 0 for each in found[:3])


@pytest.mark.parametrize("by_hand", [[3, 2], [3, 0, 2, 1], [7, -1]])
def test_a_cut_by_hand_that_is_illegal_has_no_candidates(by_hand):
    base = replace(BASE, layers_per_stage=by_hand)
    assert list(candidates(task(), base=base, fixed=frozenset({"layers_per_stage"}))) == []


def test_data_parallelism_is_held():
    found = list(candidates(task(), base=replace(BASE, dp=2), fixed=frozenset({"dp"})))
    assert {layout_of(each, task().world_size).dp for each in found} == {2}


def test_no_floor_lies_above_its_step():
    asked = task()
    for parallel in candidates(asked, base=BASE, fixed=FEW):
        assert floor_seconds(asked, parallel) <= Plan(asked, parallel).full_step.seconds * (1 + 1e-9)


def test_the_best_layouts_are_those_of_trying_all():
    asked = task()
    plans = [Plan(asked, parallel) for parallel in candidates(asked, base=BASE, fixed=FEW)]
    times = sorted({round(plan.full_step.seconds, 12) for plan in plans if plan.fits})
    found = search(asked, base=BASE, fixed=FEW, count=3)
    assert found.num_legal == len(plans)
    assert found.num_timed < len(plans)
    assert round(found.plans[0].full_step.seconds, 12) == times[0]
    seconds = [plan.full_step.seconds for plan in found.plans]
    assert seconds == sorted(seconds)


def test_layouts_that_do_not_fit_are_dropped():
    asked = task()
    needs = sorted(
        plan.peak_memory for plan in (Plan(asked, p) for p in candidates(asked, base=BASE, fixed=FEW))
    )
    middle = needs[len(needs) // 2]
    small = asked.on(replace(CARD, memory_gb=middle / 1e9))
    found = search(small, base=BASE, fixed=FEW, count=5)
    assert found.plans
    assert all(plan.peak_memory <= middle for plan in found.plans)
    none = search(asked.on(replace(CARD, memory_gb=needs[0] / 2e9)), base=BASE, fixed=FEW)
    assert none.plans == []
    assert none.smallest is not None
    assert none.smallest.peak_memory == pytest.approx(needs[0])
