"""A bad configuration is refused whole: every problem at once, with its path, value and remedy."""

import pytest

from data.config import SourceConfig
from model.config import ModelConfig, MoEConfig, YarnConfig
from tests.golden.compose import compose_run
from train.config import LrPiece, RunConfig
from train.errors import RunError
from train.validate import check, problems


def test_all_problems_are_reported_together():
    config = compose_run(
        "recipe=smoke",
        "model.moe.num_groups=3",
        "model.attention.qk_rope_head_dim=15",
        "optimizer.beta2=1.5",
        "stages.extend_32k.seq_len=1",
        "stages.extend_128k.batch.start=3",
        "stages.extend_128k.batch.end=3",
        "stages.extend_128k.parallel.microbatch_size=2",
    )
    with pytest.raises(RunError) as caught:
        check(config)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for path in (
        "model.moe.num_groups=3 must divide num_experts=16; use 2",
        "model.attention.qk_rope_head_dim=15 must be even",
        "optimizer.beta2=1.5",
        "stages.extend_32k.seq_len=1",
        "stages.extend_128k.batch.start=3 must be a multiple of parallel.microbatch_size=2; use 2 or 4",
    ):
        assert path in message
    assert message.startswith("6 problems")


def test_nested_sections_carry_their_path():
    config = compose_run("recipe=smoke")
    config.stages["extend_32k"].yarn = YarnConfig(factor=0.5)
    assert [line for line in problems(config) if line.startswith("stages.extend_32k.yarn.factor=0.5")]


def test_learning_rate_pieces_must_follow_one_another():
    config = compose_run("recipe=smoke")
    config.stages["pretrain_4k"].lr.pieces = [LrPiece(), LrPiece(until_tokens=5), LrPiece(until_tokens=4)]
    found = [line for line in problems(config) if "pieces" in line]
    assert len(found) == 2
    assert "pieces[0] has no end" in found[0]
    assert "pieces[2] ends at 4 tokens, not after 5" in found[1]


def test_unknown_source_in_a_stage_is_named():
    config = compose_run("recipe=smoke")
    config.stages["extend_32k"].source_weights = {"wikipedia": 1.0}
    assert any(
        "source_weights.wikipedia names no source" in line and "stdlib" in line for line in problems(config)
    )


def test_a_stage_may_leave_out_all_but_the_sources_it_does_not_name():
    config = compose_run("recipe=smoke")
    config.data.sources["other"] = SourceConfig(path="other")
    stage = config.stages["extend_32k"]
    stage.source_weights = {"stdlib": 0.0}
    assert problems(config) == []
    stage.source_weights["other"] = 0.0
    assert any("extend_32k.source_weights leaves no source" in line for line in problems(config))


@pytest.mark.parametrize("name", ["a/b", "a@b", "", "a b"])
def test_a_stage_name_that_cannot_be_part_of_a_file_name_is_refused(name):
    config = compose_run("recipe=smoke")
    config.stages[name] = config.stages.pop("extend_128k")
    (line,) = problems(config)
    assert line.startswith(f"stages: {name!r} names files")


@pytest.mark.parametrize("seed", [-1, 2**62, 10**27])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    assert problems(compose_run("recipe=smoke", f"seed={seed}")) == [
        f"seed={seed} must lie in [0, 2**62); use 0"
    ]
    assert problems(compose_run("recipe=smoke", f"seed={2**62 - 1}")) == []


def test_a_run_needs_stages_and_data():
    found = problems(RunConfig(recipe="x", name="x"))
    assert any(line.startswith("stages is empty") for line in found)
    assert any(line.startswith("data.sources is empty") for line in found)


def test_the_remedy_for_missing_data_composes():
    (line,) = [line for line in problems(RunConfig(recipe="x", name="x")) if line.startswith("data.sources")]
    remedy = line.partition("use ")[2].partition(" of ")[0].split()
    assert len(remedy) == 2
    assert compose_run("recipe=smoke", *remedy).data.sources["corpus"].path == "FOLDER"


@pytest.mark.parametrize(
    ("moe", "rule"),
    [
        (
            MoEConfig(num_experts=8, num_groups=2, top_k_groups=1, top_k=5),
            "top_k=5 must not exceed the 4 experts",
        ),
        (MoEConfig(num_experts=8, num_groups=8, top_k_groups=8, top_k=2), "scored by its two best"),
        (MoEConfig(num_experts=8, num_groups=2, top_k_groups=3, top_k=2), "top_k_groups=3 must not exceed"),
        (MoEConfig(num_experts=0), "num_experts=0 must be positive"),
    ],
)
def test_impossible_routing_is_refused(moe, rule):
    assert any(rule in line for line in moe.problems())


def test_published_model_breaks_no_rule():
    assert ModelConfig().problems() == []


def test_a_microbatch_larger_than_the_batch_has_one_remedy():
    config = compose_run("recipe=smoke", "stages.extend_128k.parallel.microbatch_size=16")
    (line,) = [line for line in problems(config) if "batch.start" in line]
    assert line.endswith("use 16")


def test_a_bad_group_count_does_not_hide_a_bad_top_k():
    assert len(MoEConfig(num_experts=8, num_groups=3, top_k=9).problems()) == 2


def test_a_layout_that_holds_for_every_stage_is_refused_once():
    """A job for many devices, started on one process, says in one line how many it needs."""
    config = compose_run("recipe=deepseek_v3", "parallel=deepseek_v3", "stages.extend_128k.parallel.cp=16")
    with pytest.raises(RunError) as caught:
        check(config, world_size=1)
    header, line = str(caught.value).splitlines()
    assert header == "1 problem in the configuration:"
    assert line.strip().startswith("parallel.pp=16 needs a multiple of 1024 processes")
    assert line.endswith("not 1; use 1024 processes")


def test_a_layout_that_one_stage_breaks_is_refused_at_its_path():
    config = compose_run("recipe=smoke", "stages.extend_32k.parallel.tp=3", "stages.extend_128k.seq_len=4098")
    assert problems(compose_run("recipe=smoke", "parallel.cp=2"), world_size=2) == []
    found = problems(config, world_size=3)
    assert all(line.startswith("stages.") for line in found)
    assert any(
        line.startswith("stages.extend_32k.parallel.tp=3 must divide model.vocab_size") for line in found
    )
    assert any(line.startswith("stages.extend_128k.parallel.microbatch_size=1 on dp=3") for line in found)


def test_a_wrong_degree_of_the_run_is_not_repeated_for_its_stages():
    config = compose_run("recipe=smoke", "parallel.pp=0", "stages.extend_32k.parallel.tp=0")
    assert problems(config) == [
        "parallel.pp=0 must be at least 1; use 1",
        "stages.extend_32k.parallel.tp=0 must be at least 1; use 1",
    ]


def test_every_batch_of_a_ramp_is_checked():
    config = compose_run(
        "recipe=smoke", "stages.pretrain_4k.batch={start: 8, end: 32, ramp_tokens: 1000, multiple_of: 8}"
    )
    assert problems(config) == []
    (line,) = [line for line in problems(config, world_size=2) if "pretrain" in line]
    assert line.startswith("stages.pretrain_4k.parallel.microbatch_size=8 on dp=2 ranks needs batches")
    assert "multiples of 16, not 8, 24; use microbatch_size=4," in line


def test_a_batch_that_no_microbatch_divides_is_reported_once():
    config = compose_run("recipe=smoke", "stages.extend_32k.batch={start: 3, end: 3}")
    found = problems(config, world_size=2)
    assert len(found) == 2  # start and end
    assert found[0] == (
        "stages.extend_32k.batch.start=3 must be a multiple of parallel.microbatch_size=2; use 2 or 4"
    )


def test_smoke_fits_four_processes_in_every_stage():
    config = compose_run("recipe=smoke", "parallel=pp2_ep2")
    assert problems(config, world_size=4) == []
    assert {(stage.parallel.pp, stage.parallel.ep) for stage in config.stages.values() if stage.parallel} == {
        (2, 2)
    }


def test_a_stage_takes_from_the_run_what_it_does_not_set():
    config = compose_run(
        "recipe=single_gpu", "parallel.tp=2", "parallel.schedule=zbv", "stages.extend_128k.parallel.cp=4"
    )
    for name, cp, microbatch in (("pretrain_4k", 1, 4), ("extend_32k", 1, 1), ("extend_128k", 4, 1)):
        layout = config.stages[name].parallel
        assert layout is not None
        assert (layout.tp, layout.schedule, layout.cp) == (2, "zbv", cp)
        assert layout.microbatch_size == microbatch


def test_one_node_of_eight_fits_v3_16b():
    assert problems(compose_run("recipe=v3_16b", "parallel=ep8"), world_size=8) == []
