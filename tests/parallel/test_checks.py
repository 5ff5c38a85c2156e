"""Every rule of a layout is refused with its value, its reason and a remedy that works."""

import re
from dataclasses import replace

import pytest

from model.config import ModelConfig
from parallel.checks import layout_of, layout_problems
from parallel.config import Context, Dispatcher, Engine, Offload, ParallelConfig, Schedule
from parallel.layout import Layout, check_axes
from tests.model.small import small

V3 = ModelConfig()


def found(
    world_size: int,
    *,
    model: ModelConfig = V3,
    batches: tuple[int, ...] = (64,),
    seq_len: int = 4096,
    **layout: object,
) -> list[str]:
    return layout_problems(
        ParallelConfig(**layout),  # type: ignore[arg-type]
        model=model,
        world_size=world_size,
        batch_sizes=batches,
        seq_len=seq_len,
        path="parallel",
    )


def test_one_process_with_the_default_layout_breaks_no_rule():
    assert found(1, batches=(1, 2, 3)) == []
    assert found(1, model=replace(V3, dropout=0.1), seq_len=4097) == []


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, {"pp": 2, "ep": 2}),
        (8, {"tp": 2, "cp": 2, "ep": 8}),
        (8, {"dp": 4, "dp_replicate": 2, "tp": 2}),
        (16, {"ep": 16, "dispatcher": Dispatcher.two_hop}),
        (16, {"ep": 16, "dispatcher": Dispatcher.two_hop, "node_size": 4, "pp": 1}),
        (8, {"cp": 8, "context": Context.ulysses}),
        (8, {"pp": 4, "schedule": Schedule("dualpipev")}),
        (4, {"engine": Engine.deepspeed, "zero_stage": 3, "offload": Offload.cpu, "ep": 4}),
        (64, {"pp": 4, "ep": 16, "schedule": Schedule("dualpipev"), "cp": 4, "dp": 4}),
    ],
)
def test_a_legal_layout_is_accepted_and_covers_the_processes(world_size, layout):
    assert found(world_size, batches=(64, 512), **layout) == [], layout
    made = layout_of(ParallelConfig(**layout), world_size)
    assert made.world_size == world_size
    assert check_axes(made)


def test_data_parallelism_takes_the_processes_that_are_left():
    config = ParallelConfig(pp=2, tp=2, dp_replicate=2, ep=8, dispatcher=Dispatcher.two_hop, node_size=4)
    assert layout_of(config, 16) == Layout(pp=2, dp_replicate=2, dp_shard=2, tp=2, ep=8, ep_nodes=2)
    with pytest.raises(ValueError, match="does not fit 6 processes"):
        layout_of(config, 6)


PROCESSES = [
    (6, {"pp": 4}, "pp=4 needs a multiple of 4 processes", "not 6; use 4 or 8 processes, or pp=3 or 6"),
    (1, {"pp": 16, "ep": 64}, "pp=16 needs a multiple of 1024 processes", "not 1; use 1024 processes"),
    (3, {"tp": 4}, "tp=4 needs a multiple of 4 processes", "not 3; use 4 processes, or tp=1"),
    (
        8,
        {"dp": 3, "pp": 2},
        "dp=3 times pp*cp*tp=2*1*1=2 is 6 processes, not 8",
        "use dp=4 or null, or 6 processes",
    ),
    (7, {"dp": 3, "pp": 2}, "is 6 processes, not 7", "use 6 processes"),
    (8, {"dp_replicate": 3}, "dp_replicate=3 must divide dp=8", "use 2 or 4"),
]


@pytest.mark.parametrize(("world_size", "layout", "rule", "remedy"), PROCESSES)
def test_degrees_make_up_the_processes(world_size, layout, rule, remedy):
    (line,) = found(world_size, **layout)
    assert line.startswith("parallel.")
    assert rule in line
    assert line.endswith(remedy)


EXPERTS = [
    (
        4,
        {"ep": 8},
        ["ep=8 must divide the dp*cp*tp=4*1*1=4 processes of a pipeline rank; use 4, or 8 processes"],
    ),
    (
        8,
        {"ep": 8, "dp": 4, "pp": 2},
        ["ep=8 must divide the dp*cp*tp=4*1*1=4 processes of a pipeline rank; use 4"],
    ),
    (12, {"ep": 12}, ["ep=12 must divide model.moe.num_experts=256; use 4"]),
    (
        4,
        {"ep": 3},
        [
            "ep=3 must divide the dp*cp*tp=4*1*1=4 processes of a pipeline rank; use 2 or 4",
            "ep=3 must divide model.moe.num_experts=256; use 2 or 4",
        ],
    ),
    (
        8,
        {"ep": 8, "dispatcher": Dispatcher.two_hop, "node_size": 3},
        [
            "node_size=3 must divide ep=8, or not be less, for dispatcher=two_hop; "
            "use 2 or 4, or dispatcher=alltoall"
        ],
    ),
]


@pytest.mark.parametrize(("world_size", "layout", "lines"), EXPERTS)
def test_expert_parallelism_divides_experts_and_processes(world_size, layout, lines):
    assert found(world_size, batches=(96,), **layout) == [f"parallel.{line}" for line in lines]


def test_tensor_parallelism_divides_everything_that_is_split():
    lines = found(6, model=replace(V3, dense_intermediate_size=18431), batches=(6,), tp=3)
    broken = [re.search(r"must divide ([\w.*]+)=\d+; use (.*)", line) for line in lines]
    assert [match.groups() for match in broken if match] == [
        ("model.attention.num_heads", "1"),
        ("model.vocab_size", "1"),
        ("model.dense_intermediate_size", "1"),
        ("model.moe.num_shared_experts*intermediate_size", "1"),
    ]
    assert lines[-1] == (
        "parallel.tp=3 needs seq_len=4096 to be a multiple of tp=3; use tp=1, or seq_len=4095 or 4098"
    )


def test_only_widths_that_exist_are_divided():
    model = small(
        num_heads=6, vocab_size=66, num_dense_layers=0, dense_intermediate_size=47, num_shared_experts=0
    )
    assert found(3, model=model, batches=(3,), seq_len=66, tp=3) == []
    only_mtp_has_experts = replace(model, num_dense_layers=model.num_layers, num_mtp_layers=1)
    only_mtp_has_experts.dense_intermediate_size = 48
    only_mtp_has_experts.moe = replace(model.moe, num_shared_experts=1, intermediate_size=16)
    (line,) = found(3, model=only_mtp_has_experts, batches=(3,), seq_len=66, tp=3)
    assert "tp=3 must divide model.moe.num_shared_experts*intermediate_size=16" in line


SEQUENCES = [
    ({"cp": 4, "tp": 2}, 1000, "2*cp*tp=16; use cp=2 or 5, or seq_len=992 or 1008"),
    ({"cp": 4, "tp": 2}, 1001, "2*cp*tp=16; use seq_len=992 or 1008"),
    ({"cp": 8}, 4104, "2*cp*tp=16; use cp=6 or 9, or seq_len=4096 or 4112"),
]


@pytest.mark.parametrize(("layout", "seq_len", "remedy"), SEQUENCES)
def test_sequences_are_cut_into_equal_pieces(layout, seq_len, remedy):
    (line,) = found(8, seq_len=seq_len, **layout)
    assert line == (f"parallel.cp={layout['cp']} needs seq_len={seq_len} to be a multiple of {remedy}")


def test_ulysses_divides_the_heads_of_a_tensor_parallel_rank():
    model = small(num_heads=12, vocab_size=64)
    (line,) = found(8, model=model, cp=4, tp=2, context=Context.ulysses)
    assert line == (
        "parallel.cp=4 must divide the 6 heads of a tp rank for context=ulysses; "
        "use 3 or 6, or context=gather"
    )
    assert found(8, model=model, cp=4, tp=2) == []


def test_every_stage_but_the_ends_needs_a_layer():
    model = small(num_layers=4)
    (line,) = found(8, model=model, pp=8)
    assert line == (
        "parallel.pp=8 makes 8 stages, for which model.num_layers=4 are too few: only the first and the last "
        "may do without; use 6"
    )
    (line,) = found(4, model=model, pp=4, schedule=Schedule("zbv"))
    assert line.endswith("use 3")
    assert found(6, model=model, pp=6) == found(3, model=model, pp=3, schedule=Schedule("zbv")) == []


@pytest.mark.parametrize("by_hand", [[30, 31, 0], [30, 0, 31, 0], [30, 30], [61]])
def test_a_placement_by_hand_covers_the_model(by_hand):
    (line,) = found(4, pp=4, layers_per_stage=by_hand)
    assert line.startswith(f"parallel.layers_per_stage={by_hand} must give each of 4 stages its layers")
    assert f"61 in all, not {sum(by_hand)} on {len(by_hand)} stages; use [] to balance by cost" in line


BATCHES = [
    (4, {"microbatch_size": 3}, (8, 12), "use microbatch_size=1, or a batch of 12"),
    (
        4,
        {"microbatch_size": 4},
        (24,),
        "use microbatch_size=3 or 6, or a batch of 16 or 32, or cp=2, which leaves dp=2",
    ),
    (4, {}, (2,), "use a batch of 4, or cp=2, which leaves dp=2"),
    (2, {"pp": 2, "microbatch_size": 2}, (3,), "use microbatch_size=1 or 3, or a batch of 2 or 4"),
]


@pytest.mark.parametrize(("world_size", "layout", "batches", "remedy"), BATCHES)
def test_batches_are_whole_microbatches_on_every_rank(world_size, layout, batches, remedy):
    (line,) = found(world_size, batches=batches, **layout)
    assert line.startswith(f"parallel.microbatch_size={layout.get('microbatch_size', 1)} on dp=")
    assert line.endswith(remedy)


def test_many_bad_batches_are_said_in_one_line():
    (line,) = found(8, batches=tuple(range(1, 65)))
    assert "multiples of 8, not 1, 2, 3, …; use" in line
    (line,) = found(8, batches=(1, 2, 3))
    assert "multiples of 8, not 1, 2, 3; use" in line


def test_a_batch_that_is_cut_into_no_whole_microbatches_is_not_asked_about_twice():
    (line,) = found(2, pp=2, microbatch_size=2, batches=(1,))
    assert line.startswith("parallel.microbatch_size=2 on dp=1 ranks needs batches")


def test_the_schedule_is_asked_about_every_batch_size_and_answers_once():
    (line,) = found(4, pp=4, schedule=Schedule("interleaved"), batches=(4, 9, 11, 64))
    assert line.startswith(
        "parallel.schedule=interleaved with dp=1: a batch of 9 is 9 microbatches: schedule=interleaved with "
    )
    (line,) = found(4, pp=2, schedule=Schedule("interleaved"), microbatch_size=4, batches=(64, 40))
    assert "a batch of 40 is 5 microbatches" in line
    assert line.endswith("as with microbatch_size=2 or 5")
    (line,) = found(2, pp=2, schedule=Schedule("interleaved"), chunks=1)
    assert line.startswith("parallel.chunks=1: schedule=interleaved needs at least 2 stages")


def test_without_pipeline_parallelism_the_schedule_does_not_matter():
    assert found(1, schedule=Schedule("dualpipev"), batches=(1,)) == []


def test_tensor_parallelism_stays_inside_a_node():
    lines = found(16, tp=16, node_size=8)
    assert "parallel.tp=16 reaches beyond a node of node_size=8; use 8" in lines
    assert not [line for line in found(16, tp=16, node_size=16) if "beyond a node" in line]
    assert not [line for line in found(2, tp=2, node_size=3) if "beyond a node" in line]


def test_what_the_engines_cannot_do():
    assert found(2, zero_stage=2, offload=Offload.cpu) == [
        "parallel.zero_stage=2 needs engine=deepspeed; use 1, or engine=deepspeed",
        "parallel.offload=cpu needs engine=deepspeed; use none, or engine=deepspeed",
    ]
    assert found(8, engine=Engine.deepspeed, zero_stage=3, pp=2, tp=2, dp_replicate=2) == [
        "parallel.zero_stage=3 cannot be pipelined; use 1, or pp=1",
    ]


def test_dropout_needs_one_process():
    (line,) = found(2, model=replace(V3, dropout=0.1))
    assert line == "model.dropout=0.1 would depend on the layout; use 0, or one process"


def test_wrong_single_fields_come_first():
    assert found(4, pp=0, tp=-1, ep=3) == [
        "parallel.tp=-1 must be at least 1; use 1",
        "parallel.pp=0 must be at least 1; use 1",
    ]


def test_all_rules_are_reported_together():
    lines = found(8, pp=2, tp=3, ep=5, cp=1, seq_len=4097, engine=Engine.deepspeed, zero_stage=2)
    for start in (
        "tp=3 needs a multiple",
        "ep=5 must",
        "tp=3 must divide model.vocab",
        "zero_stage=2 cannot",
    ):
        assert any(line.startswith(f"parallel.{start}") for line in lines), (start, lines)


@pytest.mark.parametrize(("world_size", "layout", "rule", "remedy"), PROCESSES)
def test_the_processes_that_a_remedy_names_are_legal(world_size, layout, rule, remedy):
    named = re.search(r"(\d+)(?: or (\d+))? processes$|(\d+)(?: or (\d+))? processes, or", remedy)
    for processes in filter(None, named.groups() if named else ()):
        assert found(int(processes), batches=(4096 * 3,), **layout) == []


@pytest.mark.parametrize(("world_size", "layout", "batches", "remedy"), BATCHES)
def test_the_batches_that_a_remedy_names_are_legal(world_size, layout, batches, remedy):
    named = re.search(r"batch of (\d+)(?: or (\d+))?", remedy)
    assert named
    for size in filter(None, named.groups()):
        assert found(world_size, batches=(int(size),), **layout) == []
