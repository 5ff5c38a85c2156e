"""The main job: three stages in order, resumed at the exact step, refused when it is another run."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from data.config import SourceConfig
from model.config import YarnConfig
from parallel.mesh import single_process
from tests.golden.compose import compose_run
from tests.train.tiny_job import job_of, metrics, overrides, train
from train.build import build_stage
from train.checkpoints.manager import CheckpointManager, newest_intact
from train.errors import EXIT_STOPPED, EXIT_UNSTABLE, RunError
from train.init_from import load_initial_weights
from train.load import load_model
from train.signals import StopRequest
from train.trainer import Trainer

SHORT_EVALUATION = [
    "evaluation.num_tokens=256",
    "evaluation.needle_trials=1",
    "evaluation.needle_depths=1",
    "evaluation.needle_lengths=1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A job that ran without interruption."""
    root = tmp_path_factory.mktemp("job")
    return train(root)


def without_data_copy(finished, tmp_path):
    """Copy the finished job's corpus and run directory to a place that a test may change."""
    shutil.copytree(finished.parent, tmp_path / "root")
    return tmp_path / "root"


def test_stages_run_in_order_and_each_ends_in_a_permanent_checkpoint(finished):
    records = metrics(finished)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    order = list(dict.fromkeys(record["stage"] for record in records))
    assert order == ["pretrain_4k", "extend_32k", "extend_128k"]
    for stage, seq_len in zip(order, (16, 64, 128), strict=True):
        of_stage = [record for record in records if record["stage"] == stage]
        assert {record["seq_len"] for record in of_stage} == {seq_len}
        assert of_stage[-1]["stage_tokens"] >= 640
        saved = newest_intact(finished / "checkpoints", stage=stage)
        assert saved is not None
        assert saved.permanent
        assert saved.progress["stage_tokens"] == of_stage[-1]["stage_tokens"]
    assert records[-1]["tokens"] == sum(r["batch_size"] * r["seq_len"] for r in records)
    sizes = [record["batch_size"] for record in records if record["stage"] == "pretrain_4k"]
    assert sizes[0] == 2
    assert sizes[-1] == 4


def test_loss_falls(finished):
    losses = [record["loss"] for record in metrics(finished)]
    assert losses[-1] < losses[0] - 0.5


def test_a_later_stage_continues_each_source_where_the_earlier_one_ended(finished):
    ends = {}
    for stage, seq_len in (("pretrain_4k", 16), ("extend_32k", 64), ("extend_128k", 128)):
        progress = newest_intact(finished / "checkpoints", stage=stage).progress
        assert progress["data_start"] == ends
        start = ends.get("stdlib", 0)
        window = 256 // seq_len  # samples; a window that was begun counts as used
        ends = {"stdlib": start + -(-progress["stage_samples"] // window) * window * seq_len}


def test_every_stage_has_its_own_rotation(finished):
    yarn = YarnConfig(original_length=16)
    plain = load_model(finished.parent / "tiny@pretrain_4k")
    extended = load_model(finished.parent / "tiny@extend_32k")
    assert plain.config.stages["pretrain_4k"].yarn is None
    assert extended.config.stages["extend_32k"].yarn == yarn
    assert not torch.equal(plain.model.rope.inv_freq, extended.model.rope.inv_freq)


def test_a_finished_job_has_nothing_left_and_changes_nothing(finished, tmp_path):
    root = without_data_copy(finished, tmp_path)
    before = metrics(root / "tiny")
    job = job_of(compose_run(*overrides(root)), root / "tiny")
    assert job.todo == []
    train(root)
    assert metrics(root / "tiny") == before


def test_raising_the_last_budget_continues_as_if_it_had_been_so_from_the_start(finished, tmp_path):
    root = without_data_copy(finished, tmp_path)
    more = "stages.extend_128k.num_tokens=1280"
    train(root, more)
    whole = train(tmp_path / "whole", more)
    assert metrics(root / "tiny") == metrics(whole)


@pytest.mark.parametrize("more", [[], ["~stages.extend_32k"]])
def test_a_budget_lowered_below_what_was_trained_ends_the_stage_there(tmp_path, more):
    more = [*more, "~stages.extend_128k", "checkpoint.keep_last=1"]
    train_until(6, tmp_path, *more)
    run = train(tmp_path, *more, "stages.pretrain_4k.num_tokens=100")
    end = newest_intact(run / "checkpoints", stage="pretrain_4k")
    assert end is not None
    assert end.progress["step"] == 6
    assert end.permanent


def test_a_stage_does_not_start_from_an_earlier_checkpoint_than_the_end_of_the_one_before(
    finished, tmp_path, monkeypatch
):
    """The checkpoint between two stages is damaged as soon as it is written: no step may be left out."""
    enough = CheckpointManager.wait

    def damage(self):
        enough(self)
        for shard in (tmp_path / "tiny" / "checkpoints").glob("pretrain_4k-00000014/*.safetensors"):
            shard.write_bytes(b"")

    end = newest_intact(finished / "checkpoints", stage="pretrain_4k").progress["step"]
    assert end == 14
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "wait", damage)
        with pytest.raises(RunError, match="checkpoint of step 14 was"):
            train(tmp_path, "~stages.extend_128k")
    records = metrics(train(tmp_path, "~stages.extend_128k"))
    assert records == metrics(finished)[: len(records)]
    assert records[-1]["stage"] == "extend_32k"


def test_results_of_lost_checkpoints_are_measured_again(tmp_path):
    """Another run may reach the same step under the same name; its model is another one."""
    more = ["~stages.extend_32k", "~stages.extend_128k", "evaluation.enabled=true", *SHORT_EVALUATION]
    run = train(tmp_path, *more)
    result = run / "evaluations" / "pretrain_4k-after.json"
    first = json.loads(result.read_text())
    shutil.rmtree(run / "checkpoints")
    train(tmp_path, *more, "seed=7")
    second = json.loads(result.read_text())
    assert first["step"] == second["step"]
    assert first["held_out"]["loss"] != second["held_out"]["loss"]


class StopAt(StopRequest):
    """A stop request that arrives during a given step."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.trainer = None

    @property
    def requested(self):
        return "SIGTERM" if self.trainer and self.trainer.state.step >= self.step else None


@pytest.mark.parametrize("step", [1, 7, 14, 19])
def test_a_stopped_job_resumes_bit_for_bit(finished, tmp_path, monkeypatch, step):
    stop = StopAt(step)
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (setattr(stop, "trainer", self), fit(self)))
    root = tmp_path / "root"
    job = job_of(compose_run(*overrides(root)), root / "tiny")
    with pytest.raises(RunError) as caught:
        job.train(stop, quiet())
    assert caught.value.exit_code == EXIT_STOPPED
    assert metrics(root / "tiny")[-1]["step"] == step
    assert metrics(train(root)) == metrics(finished)
    assert_same_weights(root / "tiny", finished)


def test_lost_steps_are_repeated_bit_for_bit(finished, tmp_path):
    """As after kill -9: metrics are ahead of the last checkpoint, whose successors never came to be."""
    root = without_data_copy(finished, tmp_path)
    for saved in sorted((root / "tiny" / "checkpoints").iterdir()):
        if int(saved.name.rpartition("-")[2]) > 16:
            shutil.rmtree(saved)
    assert metrics(root / "tiny") == metrics(finished)
    assert metrics(train(root)) == metrics(finished)


@pytest.mark.parametrize(
    "more", [["model.dropout=0.1"], ["precision=bf16"], ["precision=fp16"], ["optimizer.ema_decay=0.9"]]
)
def test_resuming_is_exact_with(tmp_path, monkeypatch, more):
    whole = train(tmp_path / "whole", *more)
    stop = StopAt(6)
    fit = Trainer.fit
    root = tmp_path / "root"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self: (setattr(stop, "trainer", self), fit(self)))
        with pytest.raises(RunError):
            job_of(compose_run(*overrides(root, *more)), root / "tiny").train(stop, quiet())
    assert metrics(train(root, *more)) == metrics(whole)
    assert_same_weights(root / "tiny", whole)


def test_microbatches_and_recomputation_do_not_change_the_routers(tmp_path):
    """Loads are exact counts over the global batch, so the biases are equal to the last bit."""
    short = ["~stages.extend_32k", "~stages.extend_128k", "stages.pretrain_4k.batch={start: 8, end: 8}"]
    short += ["stages.pretrain_4k.num_tokens=512"]
    biases = []
    for size in (8, 4, 1):
        for mode in ("none", "deepseek", "core", "full"):
            root = tmp_path / f"{size}-{mode}"
            run = train(root, *short, f"parallel.microbatch_size={size}", f"parallel.recompute={mode}")
            model = load_model(run).model
            biases.append(torch.stack([router.bias for router in model.routers().values()]))
    assert biases[0].abs().max() > 0
    assert all(torch.equal(bias, biases[0]) for bias in biases)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.hidden_size=48", "model.hidden_size: the run has 32, the configuration now says 48"),
        ("seed=1", "seed: the run has 0"),
        ("data.fim_rate=0.5", "data: the run has"),
        ("stages.extend_128k.seq_len=64", "stages.extend_128k.seq_len: the run has 128"),
    ],
)
def test_another_model_or_other_data_are_refused_and_nothing_is_lost(finished, tmp_path, change, named):
    root = without_data_copy(finished, tmp_path)
    before = sorted(path for path in root.rglob("*"))
    with pytest.raises(RunError, match="cannot be resumed") as caught:
        job_of(compose_run(*overrides(root, "stages.extend_128k.num_tokens=1280", change)), root / "tiny")
    assert caught.value.exit_code == 2
    assert named in str(caught.value)
    assert sorted(path for path in root.rglob("*")) == before


@pytest.mark.parametrize(("before", "after"), [("null", "0.9"), ("0.9", "null")])
def test_an_average_that_comes_or_goes_is_refused_before_anything_is_written(tmp_path, before, after):
    short = ["~stages.extend_32k", "~stages.extend_128k"]
    run = train(tmp_path, *short, f"optimizer.ema_decay={before}", "stages.pretrain_4k.num_tokens=64")
    config = (run / "config.yaml").read_text()
    with pytest.raises(RunError, match=r"optimizer\.ema_decay: the run has"):
        train(tmp_path, *short, f"optimizer.ema_decay={after}")
    assert (run / "config.yaml").read_text() == config
    if before != "null":
        train(tmp_path, *short, "optimizer.ema_decay=0.5")


@pytest.mark.parametrize("where", ["data.sources", "stage"])
def test_another_mixture_within_a_stage_is_refused(tmp_path, where):
    """Sample i would come from another source: some would be drawn twice and some never."""
    config = compose_run(*overrides(tmp_path))
    config.data.sources["other"] = SourceConfig(path=config.data.sources["stdlib"].path)
    config.stages["pretrain_4k"].num_tokens = 1
    config.stages = {"pretrain_4k": config.stages["pretrain_4k"]}
    job_of(config, tmp_path / "tiny").train(StopRequest(), quiet())
    config.stages["pretrain_4k"].num_tokens = 640
    assert job_of(config, tmp_path / "tiny").todo == ["pretrain_4k"]
    if where == "stage":
        config.stages["pretrain_4k"].source_weights = {"other": 9.0}
    else:
        config.data.sources["other"].weight = 9.0
    with pytest.raises(RunError, match=r"source_weights\.other: the run has 1\.0, the .* says 9\.0"):
        job_of(config, tmp_path / "tiny")


def test_a_refused_job_leaves_no_trace(tmp_path):
    config = compose_run(*overrides(tmp_path, "init_from=nowhere"))
    with pytest.raises(RunError, match="nowhere"):
        job_of(config, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_run_can_start_from_the_weights_of_another(finished, tmp_path):
    root = without_data_copy(finished, tmp_path)
    config = compose_run(*overrides(root, "name=second", f"init_from={root}/tiny", "seed=5"))
    parts = build_stage(
        config, config.stages["pretrain_4k"], device=torch.device("cpu"), mesh=single_process()
    )
    load_initial_weights(parts, root / "tiny")
    theirs = load_model(root / "tiny").model.state_dict()
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in parts.model.parts[0].state_dict().items()
    )
    train(root, "name=second", f"init_from={root}/tiny", "seed=5")
    assert metrics(root / "second")[0]["loss"] < metrics(finished)[0]["loss"] - 0.5


def test_a_stage_may_begin_with_fresh_moments(tmp_path):
    run = train(tmp_path, "stages.extend_32k.optimizer_state=reset", "~stages.extend_128k")
    progress = newest_intact(run / "checkpoints").progress
    assert progress["num_updates"] == progress["stage_step"] < progress["step"]


def test_an_unstable_run_stops_itself_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, "~stages.extend_32k", "~stages.extend_128k")
    calls = []

    def poisoned(self, batch_size):
        calls.append(batch_size)
        next(iter(self.parts.model.named_parameters().values())).data.fill_(float("nan"))
        return next_batch(self, batch_size)

    next_batch = Trainer.next_batch
    monkeypatch.setattr(Trainer, "next_batch", poisoned)
    more = [
        "optimizer.max_skipped_steps=3",
        "stages.pretrain_4k.num_tokens=6400",
        "checkpoint.every_steps=1000",
    ]
    with pytest.raises(RunError, match="3 times in a row") as caught:
        train(tmp_path, "~stages.extend_32k", "~stages.extend_128k", *more)
    assert caught.value.exit_code == EXIT_UNSTABLE
    assert len(calls) == 3
    assert [record["skipped"] for record in metrics(tmp_path / "tiny")[-3:]] == [True, True, True]
    saved = newest_intact(tmp_path / "tiny" / "checkpoints")
    assert saved.progress["skipped"] == 0
    assert json.loads(json.dumps(saved.progress))["stage"] == "pretrain_4k"


def test_a_pattern_that_matches_no_parameter_is_refused(tmp_path):
    config = compose_run(*overrides(tmp_path, "+optimizer.lr_multipliers.attn=0.5"))
    with pytest.raises(RunError, match="no parameter matches 'attn'"):
        job_of(config, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def train_until(step, root, *more):
    """Train the job and stop it after a step."""
    stop = StopAt(step)
    fit = Trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self: (setattr(stop, "trainer", self), fit(self)))
        with pytest.raises(RunError) as caught:
            job_of(compose_run(*overrides(root, *more)), root / "tiny").train(stop, quiet())
    assert caught.value.exit_code == EXIT_STOPPED


def quiet():
    return Console(quiet=True)


def assert_same_weights(run, other):
    theirs = load_model(other).model.state_dict()
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in load_model(run).model.state_dict().items()
    )


def test_a_model_changed_between_two_stages_is_refused_too(tmp_path):
    train(tmp_path, "~stages.extend_32k", "~stages.extend_128k")
    with pytest.raises(RunError, match=r"model\.hidden_size: the run has 32"):
        job_of(compose_run(*overrides(tmp_path, "model.hidden_size=48")), tmp_path / "tiny")


def test_another_seed_is_refused_on_a_finished_run_too(finished, tmp_path):
    root = without_data_copy(finished, tmp_path)
    with pytest.raises(RunError, match="seed: the run has 0"):
        job_of(compose_run(*overrides(root, "seed=1")), root / "tiny")
