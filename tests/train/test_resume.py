"""What a run says when it goes on, and what it names when it may not."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.golden.compose import compose_run
from tests.train.tiny_job import job_of, overrides, train
from train.errors import RunError
from train.signals import StopRequest

STAGE = ["~stages.extend_32k", "~stages.extend_128k"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that has finished one stage of step 14."""
    root = tmp_path_factory.mktemp("resume")
    train(root, *STAGE)
    return root


def said(root: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> str:
    config = compose_run(*overrides(root, *STAGE, *more))
    job_of(config, root / "tiny").train(StopRequest(), Console(width=40))
    return capsys.readouterr().out


def test_a_resumed_run_says_where_it_goes_on_and_what_is_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = "stages.pretrain_4k.num_tokens=800", "stages.pretrain_4k.num_tokens=900"
    assert "continues from" not in said(tmp_path, capsys=capsys)
    assert said(tmp_path, capsys=capsys) == ""
    lines = said(tmp_path, first, "checkpoint.every_steps=9", capsys=capsys).splitlines()
    assert lines[0] == (
        "continues from pretrain_4k-00000014 (step 14, 672 tokens) with checkpoint.every_steps=9 (was 4), "
        "stages.pretrain_4k.num_tokens=800 (was 640)"
    )
    assert lines[1].startswith("── stage pretrain_4k")
    lines = said(tmp_path, second, "checkpoint.every_steps=9", capsys=capsys).splitlines()
    assert lines[0] == (
        "continues from pretrain_4k-00000016 (step 16, 800 tokens) with stages.pretrain_4k.num_tokens=900 "
        "(was 800)"
    )


def test_many_changes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(tmp_path, capsys=capsys)
    names = ["beta1", "beta2", "weight_decay", "eps", "max_grad_norm"]
    more = [f"optimizer.{name}=0.5" for name in names]
    more += ["logging.console_every=3", "logging.histogram_every=3", "checkpoint.every_steps=3"]
    more += ["checkpoint.keep_last=7", "stages.pretrain_4k.num_tokens=800"]
    line = said(tmp_path, *more, capsys=capsys).splitlines()[0]
    assert len(re.findall(r"\(was ", line)) == 8
    assert line.endswith(" and 2 more changes")


def refusal(root: Path, *more: str) -> list[str]:
    with pytest.raises(RunError, match="cannot be resumed") as caught:
        job_of(
            compose_run(*overrides(root, *STAGE, "stages.pretrain_4k.num_tokens=900", *more)), root / "tiny"
        )
    return [line for line in str(caught.value).splitlines() if line.startswith("  ")]


def test_another_seed_is_one_difference(root: Path) -> None:
    assert refusal(root, "seed=1") == ["  seed: the run has 0, the configuration now says 1"]


def test_another_seed_does_not_hide_other_data(root: Path) -> None:
    data, seed = refusal(root, "seed=1", "data.fim_rate=0.5")
    (alone,) = refusal(root, "data.fim_rate=0.5")
    assert data == alone
    assert seed.startswith("  seed: ")
