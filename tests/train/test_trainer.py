"""The loop against the rules it states: what a step is taken with, and what a skipped one leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from parallel.mesh import single_process
from tests.golden.compose import compose_run
from tests.train.tiny_job import job_of, metrics, overrides, train
from train.build import build_stage
from train.checkpoints.manifest import verify
from train.init_from import load_initial_weights
from train.schedule import batch_size_at, lr_at, steps_value
from train.signals import StopRequest
from train.trainer import Trainer

ONE_STAGE = ["~stages.extend_32k", "~stages.extend_128k"]
TOO_LARGE, USABLE = 2.0**40, 2.0**10
EVERY_OTHER_STEP_OVERFLOWS = [
    *ONE_STAGE,
    "precision=fp16",
    f"precision.loss_scale.initial={TOO_LARGE}",
    f"precision.loss_scale.growth_factor={TOO_LARGE / USABLE}",
    f"precision.loss_scale.backoff_factor={USABLE / TOO_LARGE}",
    "precision.loss_scale.growth_interval=1",
    "optimizer.max_skipped_steps=2",
    "optimizer.ema_decay=0.9",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=100",
]


def test_every_step_takes_what_the_schedules_say_at_its_stages_own_tokens(tmp_path: Path) -> None:
    more = [
        "~stages.extend_128k",
        "stages.extend_32k.lr.warmup_steps=3",
        "stages.extend_32k.mtp_weight={values: [0.4, 0.2], boundaries: [256]}",
        "stages.extend_32k.bias_speed={values: [0.01, 0.0], boundaries: [384]}",
        "logging.histogram_every=3",
    ]
    config = compose_run(*overrides(tmp_path, *more))
    records = metrics(train(tmp_path, *more))
    for name, stage in config.stages.items():
        tokens = 0
        for number, record in enumerate((r for r in records if r["stage"] == name), 1):
            lr = lr_at(stage.lr, step=number, tokens=tokens, num_tokens=stage.num_tokens)
            assert record["lr"] == lr
            assert record["batch_size"] == batch_size_at(stage.batch, tokens)
            assert record["mtp_weight"] == steps_value(stage.mtp_weight, tokens)
            assert record["bias_speed"] == steps_value(stage.bias_speed, tokens)
            assert ("load" in record) == (record["step"] % 3 == 0)
            tokens += record["batch_size"] * stage.seq_len
            assert record["stage_tokens"] == tokens
        assert number > 3


def tensors_of(run: Path, step: int) -> dict[str, Tensor]:
    """Return all tensors of the checkpoint of a step; one process writes them whole."""
    (folder,) = (run / "checkpoints").glob(f"*-{step:08d}")
    found: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def progress_of(run: Path, step: int) -> dict[str, Any]:
    (folder,) = (run / "checkpoints").glob(f"*-{step:08d}")
    return verify(folder).progress


def test_a_skipped_step_moves_nothing_but_the_loss_scale(tmp_path: Path) -> None:
    run = train(tmp_path, *EVERY_OTHER_STEP_OVERFLOWS)
    records = metrics(run)
    assert len(records) > 6
    for record in records:
        skipped = record["step"] % 2 == 1
        assert record["skipped"] == skipped
        assert record["loss_scale"] == (TOO_LARGE if skipped else USABLE)
    for step in range(2, len(records)):
        before, after = tensors_of(run, step), tensors_of(run, step + 1)
        same = {name for name in before if torch.equal(before[name], after[name])}
        if records[step]["skipped"]:
            assert same == set(before)
        else:
            moved = set(before) - same
            assert {"model.layers.1.ffn.gate.bias", "model.embed.weight", "ema.embed.weight"} <= moved
    assert not tensors_of(run, 1)["model.layers.1.ffn.gate.bias"].any()
    last = progress_of(run, len(records))
    assert last["skipped"] == sum(record["skipped"] for record in records)
    assert last["num_updates"] == len(records) - last["skipped"]


def test_the_loss_scale_goes_on_where_it_was(tmp_path: Path) -> None:
    more = [*EVERY_OTHER_STEP_OVERFLOWS, "stages.pretrain_4k.batch={start: 4, end: 4}"]
    run = train(tmp_path, *more, f"stages.pretrain_4k.num_tokens={3 * 4 * 16}")
    assert progress_of(run, 3)["loss_scale"]["value"] == USABLE
    records = metrics(train(tmp_path, *more, f"stages.pretrain_4k.num_tokens={5 * 4 * 16}"))
    assert [record["skipped"] for record in records] == [True, False, True, False, True]


def test_dropout_draws_anew_in_every_step_and_repeats_with_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen through torch's generator when the batch has been run: two steps with one seed draw one mask."""
    drawn: list[int] = []
    update = Trainer.update

    def noted(self: Trainer, *arguments: Any) -> Any:
        assert self.watchdog.step == self.state.step + 1
        drawn.append(torch.initial_seed())
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", noted)
    train(tmp_path, *ONE_STAGE, "name=first", "stages.pretrain_4k.num_tokens=160")
    first, steps = list(drawn), len(drawn)
    train(tmp_path, *ONE_STAGE, "name=second", "stages.pretrain_4k.num_tokens=160")
    assert drawn[steps:] == first
    assert len(set(first)) == steps > 2
    train(tmp_path, *ONE_STAGE, "name=third", "seed=1000", "stages.pretrain_4k.num_tokens=160")
    assert not set(first) & set(drawn[2 * steps :])


def test_a_run_from_other_weights_begins_its_average_and_its_count_there(tmp_path: Path) -> None:
    first = train(tmp_path, *ONE_STAGE)
    config = compose_run(*overrides(tmp_path, *ONE_STAGE, "seed=5", "optimizer.ema_decay=0.9"))
    device = torch.device("cpu")
    parts = build_stage(config, config.stages["pretrain_4k"], device=device, mesh=single_process())
    load_initial_weights(parts, first)
    assert parts.engine.num_updates == 0
    tensors = parts.tensors()
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    assert averages
    for name, average in averages.items():
        weight = tensors[name.replace("ema.", "model.", 1)]
        assert isinstance(average, Tensor)
        assert isinstance(weight, Tensor)
        assert torch.equal(average, weight)


def test_a_loss_that_is_not_finite_skips_the_step_though_its_gradients_are(tmp_path: Path) -> None:
    config = compose_run(*overrides(tmp_path, *ONE_STAGE))
    device, stage = torch.device("cpu"), config.stages["pretrain_4k"]
    engine = build_stage(config, stage, device=device, mesh=single_process()).engine
    before = [master.clone() for master in engine.masters().values()]
    for skipped in (True, False):
        engine.reduce()
        update = engine.update(lr=0.1, max_norm=1.0, loss_scale=1.0, finite=not skipped)
        assert update.skipped == skipped
        same = [torch.equal(*pair) for pair in zip(before, engine.masters().values(), strict=True)]
        assert all(same) == skipped


class AlwaysAsked(StopRequest):
    """A signal that arrives during every step."""

    @property
    def requested(self) -> str:
        return "SIGTERM"


def test_a_signal_in_the_last_step_of_all_stops_nothing(tmp_path: Path) -> None:
    config = compose_run(*overrides(tmp_path, *ONE_STAGE, "stages.pretrain_4k.num_tokens=1"))
    job = job_of(config, tmp_path / "tiny")
    job.train(AlwaysAsked(), Console(quiet=True))
    assert len(metrics(tmp_path / "tiny")) == 1
    assert job_of(config, tmp_path / "tiny").todo == []
