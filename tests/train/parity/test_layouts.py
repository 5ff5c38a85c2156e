"""Names of layouts: what they mean, in any order, and what is said about one that means nothing."""

from itertools import permutations

import pytest

from parallel.config import Context, Dispatcher, Engine, Schedule
from train.errors import RunError
from train.parity.command import chosen_layouts
from train.parity.layouts import DEFAULT, parse
from train.parity.task import PLAIN


def test_the_words_of_a_name_come_in_any_order() -> None:
    expected = parse("pp2_dualpipev_ep2_tp2").parallel
    assert (expected.pp, expected.ep, expected.tp, expected.dp) == (2, 2, 2, 1)
    assert expected.schedule is Schedule("dualpipev")
    for words in permutations(("pp2", "dualpipev", "ep2", "tp2")):
        assert parse("_".join(words)).parallel == expected


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("dp2", 2),
        ("tp4", 4),
        ("ep4", 4),
        ("tp2_ep2", 2),
        ("cp2_ep4", 4),
        ("pp4_zbv_ep2", 8),
        ("dp2_tp2_cp2", 8),
    ],
)
def test_the_number_of_processes_follows(name: str, processes: int) -> None:
    assert parse(name).world_size == processes


def test_schedules_engines_and_options() -> None:
    assert parse("pp2_interleaved_zb").parallel.schedule is Schedule("interleaved_zb")
    assert parse("pp2_interleaved").parallel.schedule is Schedule("interleaved")
    deepspeed = parse("dp4_deepspeed2").parallel
    assert (deepspeed.engine, deepspeed.zero_stage) == (Engine.deepspeed, 2)
    assert parse("cp2_ulysses").parallel.context is Context.ulysses
    hop = parse("ep4_twohop2").parallel
    assert (hop.dispatcher, hop.node_size) == (Dispatcher.two_hop, 2)
    assert parse("dp4_replicate2").layout.dp_shard == 2


@pytest.mark.parametrize("name", ["", "dp", "xp2", "dp2_fast", "dp2-tp2", "zero3", "dp0"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    if name:
        with pytest.raises(ValueError, match=name.split("_")[-1]):
            parse(name)
    else:
        assert parse(name).world_size == 1


def test_every_layout_that_cannot_run_is_listed() -> None:
    with pytest.raises(RunError) as caught:
        chosen_layouts(["dp2", "tp3", "dp2_what", "pp2_dp3"], PLAIN)
    message = str(caught.value)
    assert "tp3.tp=3" in message
    assert "'what'" in message
    assert "pp2_dp3" in message
    assert "dp2." not in message


def test_the_default_matrix_can_run() -> None:
    assert [layout.name for layout in chosen_layouts(DEFAULT, PLAIN)] == list(DEFAULT)
