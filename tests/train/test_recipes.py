"""Every recipe composes to its golden file, breaks no rule, and says what the reports say."""

import re
from pathlib import Path

import pytest

from launch.plan.question import questions
from model.config import YarnConfig
from parallel.checks import layout_of
from parallel.planner import Plan
from tests.golden.compose import FOLDER, RECIPES, compose_run, golden_text
from tests.golden.config_reference import PAGE, page
from train.schedule import batch_size_at, lr_at, num_steps, steps_value
from train.stored_config import config_text, read_config
from train.validate import problems


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_equals_its_golden_file(recipe):
    golden = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert golden_text(recipe) == golden, "run `python -m tests.golden.compose` and review the difference"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_breaks_no_rule(recipe):
    config = compose_run(f"recipe={recipe}")
    assert problems(config, world_size=config.cluster.num_devices or 1) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_stored_configuration_reads_back_equal(recipe, tmp_path):
    config = compose_run(f"recipe={recipe}")
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == config


def test_deepseek_v3_is_the_published_model():
    model = compose_run("recipe=deepseek_v3").model
    assert (model.num_layers, model.num_dense_layers, model.hidden_size) == (61, 3, 7168)
    assert (model.vocab_size, model.dense_intermediate_size, model.num_mtp_layers) == (129280, 18432, 1)
    attention, moe = model.attention, model.moe
    assert (attention.num_heads, attention.q_lora_rank, attention.kv_lora_rank) == (128, 1536, 512)
    assert (attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim) == (128, 64, 128)
    assert (moe.num_experts, moe.num_shared_experts, moe.top_k, moe.intermediate_size) == (256, 1, 8, 2048)
    assert (moe.num_groups, moe.top_k_groups, moe.route_scale) == (8, 4, 2.5)
    assert (moe.balance_loss_weight, model.init_std, model.norm_eps) == (0.0001, 0.006, 1e-6)


def test_deepseek_v3_is_the_published_schedule():
    config = compose_run("recipe=deepseek_v3")
    assert list(config.stages) == ["pretrain_4k", "extend_32k", "extend_128k"]
    stage = config.stages["pretrain_4k"]
    trillion = 10**12

    def lr(tokens):
        return lr_at(stage.lr, step=10**6, tokens=tokens, num_tokens=stage.num_tokens)

    assert stage.num_tokens == 14_800 * 10**9
    assert lr_at(stage.lr, step=2000, tokens=0, num_tokens=stage.num_tokens) == pytest.approx(2.2e-4)
    assert lr(10 * trillion - 1) == pytest.approx(2.2e-4)
    assert lr(12_150 * 10**9) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert lr(14_300 * 10**9) == lr(14_633 * 10**9 - 1) == pytest.approx(2.2e-5)
    assert lr(14_633 * 10**9) == lr(stage.num_tokens - 1) == pytest.approx(7.3e-6)
    assert batch_size_at(stage.batch, 0) == 3072
    assert batch_size_at(stage.batch, 469 * 10**9) == 15360
    assert [steps_value(stage.mtp_weight, t * trillion) for t in (0, 9.99, 10, 14)] == [0.3, 0.3, 0.1, 0.1]
    assert [steps_value(stage.bias_speed, int(t * trillion)) for t in (0, 14.29, 14.3)] == [0.001, 0.001, 0.0]
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.max_grad_norm, optimizer.moments) == (1.0, "bf16")
    assert config.data.fim_rate == 0.1


@pytest.mark.parametrize(
    ("stage", "seq_len", "batch"), [("extend_32k", 32768, 1920), ("extend_128k", 131072, 480)]
)
def test_deepseek_v3_extends_as_published(stage, seq_len, batch):
    extension = compose_run("recipe=deepseek_v3").stages[stage]
    assert (extension.seq_len, batch_size_at(extension.batch, 0)) == (seq_len, batch)
    assert num_steps(extension) == 1000
    assert lr_at(extension.lr, step=1, tokens=0, num_tokens=extension.num_tokens) == pytest.approx(7.3e-6)
    assert extension.yarn == YarnConfig(
        factor=40.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
    )


def test_every_stage_of_deepseek_v3_gives_a_rank_as_many_tokens():
    config = compose_run("recipe=deepseek_v3")
    assert config.cluster.num_devices == 2048
    for stage in config.stages.values():
        assert stage.parallel is not None
        layout = layout_of(stage.parallel, 2048)
        assert (layout.pp, layout.ep, layout.dp * layout.cp) == (16, 64, 128)
        assert stage.seq_len // layout.cp == 4096
        assert stage.batch.end // layout.dp == 120
    assert config.stages["pretrain_4k"].batch.start // 128 == 24


def test_smoke_is_v3_scaled_down():
    stages = compose_run("recipe=smoke").stages
    assert [stage.seq_len for stage in stages.values()] == [128, 1024, 4096]
    assert [stage.yarn and (stage.yarn.factor, stage.yarn.original_length) for stage in stages.values()] == [
        None,
        (40.0, 128),
        (40.0, 128),
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_fits_the_recipes_own_cluster(recipe):
    published = ["precision=fp8_triton"] if recipe == "deepseek_v3" else []  # in BF16 it does not fit
    config = compose_run(f"recipe={recipe}", *published)
    assert config.cluster.memory_gb is not None
    for question in questions(config, overrides=(), world_size=config.cluster.num_devices or 1):
        plan = Plan(question.task, question.own)
        assert question.problems == []
        assert plan.fits, f"{question.name}: {plan.peak_memory / 1e9:.1f} GB, use a layout of `launch plan`"


def test_v3_16b_is_for_one_node_and_says_so():
    config = compose_run("recipe=v3_16b")
    assert (config.cluster.num_devices, config.cluster.node_size) == (8, 8)
    assert problems(config, world_size=16) == []  # several nodes go on from there
    found = problems(config, world_size=1)
    assert len(found) == len(config.stages)
    assert all("8 processes" in line for line in found)


def test_all_choices_of_every_group_are_documented():
    configs = Path(__file__).resolve().parents[2] / "configs"
    choices = {
        group.name: {file.stem for file in group.glob("*.yaml")}
        for group in configs.iterdir()
        if group.is_dir() and any(group.glob("*.yaml"))
    }
    table = PAGE.read_text(encoding="utf-8").partition("| group | choices |")[2].partition("\n\n")[0]
    rows = (row.split("|")[1:3] for row in table.splitlines()[2:])
    named = {group.strip(" `"): set(re.findall(r"`([a-z0-9_]+)`", listed)) for group, listed in rows}
    assert named == choices
    assert set(RECIPES) == choices["recipe"]


def test_the_configuration_reference_is_true():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.golden.config_reference`"
