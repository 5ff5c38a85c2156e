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
