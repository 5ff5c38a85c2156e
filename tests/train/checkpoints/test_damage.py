"""Damaged checkpoints are named and never used, and a full disk costs none that was whole."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.train.checkpoints.saved import assert_holds, names, save, state
from tests.train.small_disk import small_disk
from train.checkpoints.manager import CheckpointManager
from train.errors import RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def flip_a_bit(path: Path) -> None:
    shard = path / "shard-00000-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def truncate(path: Path) -> None:
    shard = path / "shard-00000-000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def tear_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_a_bit, "shard-00000-000.safetensors has changed"),
    "size": (truncate, "bytes instead of"),
    "shard": (lambda path: (path / "shard-00000-000.safetensors").unlink(), "safetensors is missing"),
    "progress": (lambda path: (path / "progress.json").write_text("{}"), "progress.json has 2 bytes"),
    "config": (lambda path: (path / "config.yaml").unlink(), "config.yaml is missing"),
    "metadata": (lambda path: (path / "metadata.json").unlink(), "metadata.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (tear_manifest, "manifest.json is unreadable"),
    "odd manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is unreadable"),
    "format": (lambda path: (path / "manifest.json").write_text('{"format": 9}'), "has format 9"),
    "empty": (lambda path: (shutil.rmtree(path), path.mkdir()), "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=False)
    save(manager, 1)
    save(manager, 2)
    damage, reason = DAMAGE[kind]
    damage(folder / "stage-00000002")
    assert_holds(CheckpointManager(folder, keep_last=5, asynchronous=False), 1)
    message = capsys.readouterr().err
    assert str(folder / "stage-00000002") in message
    assert reason in message
    # the run goes on: the damaged one is written anew
    save(manager, 2)
    assert_holds(manager, 2)


def test_all_damaged_is_an_error_that_lists_all(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=False)
    for step in (1, 2, 3):
        save(manager, step)
    flip_a_bit(folder / "stage-00000001")
    truncate(folder / "stage-00000002")
    tear_manifest(folder / "stage-00000003")
    with pytest.raises(RunError) as caught:
        manager.latest()
    for step, reason in ((1, "has changed"), (2, "bytes instead of"), (3, "is unreadable")):
        assert any(
            f"stage-{step:08d}: " in line and reason in line for line in str(caught.value).splitlines()
        )


def test_a_load_of_other_tensors_is_refused(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=False)
    save(manager, 1)
    saved = manager.latest()
    assert saved is not None
    wanted = state(0)
    wanted["model.v"] = wanted.pop("model.w")
    with pytest.raises(RunError, match=r"model\.v.*missing(.|\n)*model\.w.*extra"):
        manager.load(saved, wanted)


def test_no_space_left_is_reported_by_the_next_call_and_the_last_checkpoint_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(folder, keep_last=1, asynchronous=True)
    save(manager, 1)
    manager.wait()
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        save(manager, 2)  # returns: it fails in the background
        with pytest.raises(RunError, match=r"stage-00000002 could not be saved.*No space left") as caught:
            manager.wait()
    assert "last good checkpoint" in str(caught.value)
    assert "stage-00000001" in str(caught.value)
    assert names(folder) == ["stage-00000001"]
    save(manager, 3)  # room again
    manager.wait()
    assert_holds(manager, 3)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "tiny", kilobytes=256) as disk:
        yield disk


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(tiny_disk: Path, asynchronous: bool) -> None:
    manager = CheckpointManager(tiny_disk / "checkpoints", keep_last=3, asynchronous=asynchronous)
    save(manager, 1)
    manager.wait()
    big = {"w": torch.zeros(1 << 18)}

    def save_big() -> None:
        manager.save("big-1", big, {}, config_yaml="", permanent=False)
        manager.wait()

    with pytest.raises(RunError, match="No space left on device"):
        save_big()
    assert names(tiny_disk / "checkpoints") == ["stage-00000001"]
    assert_holds(manager, 1)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, where the run should be")
    with pytest.raises(RunError, match="cannot be used"):
        CheckpointManager(tmp_path / "run" / "checkpoints", keep_last=1, asynchronous=False)
