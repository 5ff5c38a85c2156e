"""The manager of many processes: one checkpoint, one answer, and a failure of one is a failure of all."""

import errno
import io
import json
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from torch import distributed

from parallel.layout import Layout
from tests.distributed import run_ranks
from tests.train.checkpoints.layouts import Share, poisoned_share, whole_group, whole_tensors
from train.checkpoints.manager import CheckpointManager, newest_intact
from train.checkpoints.manifest import SavedCheckpoint
from train.checkpoints.storage import load_tensors
from train.errors import RunError

SIZE = 3
LAYOUT = Layout(dp_shard=SIZE)
OTHER = Layout(tp=SIZE, ep=SIZE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(manager: CheckpointManager, share: Share, step: int, *, permanent: bool = False) -> None:
    manager.save(
        f"s-{step}",
        share.fill(step).tensors(),
        {"step": step},
        config_yaml=f"name: run-{step}\n",
        permanent=permanent,
    )


def latest(manager: CheckpointManager) -> SavedCheckpoint:
    saved = manager.latest()
    assert saved is not None
    return saved


def error_of(action: Callable[[], object], kind: type[Exception] = RunError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def same_on_all(value: object) -> bool:
    values = [None] * SIZE
    distributed.all_gather_object(values, value)
    return all(other == value for other in values)


# ---- saving and loading ---------------------------------------------------------------------------------


def save_and_load(rank: int, folder: Path, asynchronous: bool) -> None:
    world = whole_group(rank, SIZE)
    manager = CheckpointManager(folder, keep_last=2, asynchronous=asynchronous, group=world)
    assert manager.latest() is None
    share = poisoned_share(LAYOUT, rank)
    for step in range(1, 6):
        save(manager, share, step, permanent=step == 2)
        for _ in range(20):  # training goes on with its own groups, at each rank's own pace
            if asynchronous:
                share.fill(99)
            assert world.all_reduce(torch.ones(4)).tolist() == [SIZE] * 4
    saved = latest(manager)
    assert (saved.name, saved.progress) == ("s-5", {"step": 5})
    assert same_on_all(saved)
    for layout in (LAYOUT, OTHER):
        loaded = poisoned_share(layout, rank)
        manager.load(saved, loaded.tensors())
        assert loaded.wrong(5) == []
    manager.keep(saved)
    save(manager, share, 6)
    manager.wait()
    distributed.barrier()
    assert names(folder) == ["s-2", "s-4", "s-5", "s-6"]
    assert newest_intact(folder, stage="s", group=world) == newest_intact(folder, stage="s")


def saves_of_both_kinds(rank: int, folder: Path) -> None:
    for asynchronous in (False, True):
        save_and_load(rank, folder / str(asynchronous), asynchronous)


def test_many_ranks_save_and_load_as_one(tmp_path: Path) -> None:
    run_ranks(SIZE, saves_of_both_kinds, tmp_path)
    for kind in ("False", "True"):
        saved = newest_intact(tmp_path / kind, stage="s")
        assert saved is not None
        assert saved.permanent
        manifest = json.loads((saved.path / "manifest.json").read_text())
        assert {f"shard-{rank:05d}-000.safetensors" for rank in range(SIZE)} < set(manifest["files"])
        assert manifest["tensors"]["wo"] == "bfloat16[6, 10]"
        assert manifest["tensors"].keys() == whole_tensors().keys()
        assert (saved.path / "config.yaml").read_text() == "name: run-5\n"
        loaded = {name: torch.full_like(tensor, -1) for name, tensor in whole_tensors().items()}
        load_tensors(saved.path, loaded)
        assert all(torch.equal(loaded[name], tensor * 5) for name, tensor in whole_tensors().items())


# ---- what goes wrong ------------------------------------------------------------------------------------


def no_room(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def a_full_disk(rank: int, folder: Path, *, asynchronous: bool, culprit: int) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=asynchronous, group=whole_group(rank, SIZE))
    share = poisoned_share(LAYOUT, rank)
    save(manager, share, 1)
    manager.wait()

    def save_second() -> None:
        save(manager, share, 2)
        manager.wait()

    with pytest.MonkeyPatch.context() as patch:
        if rank == culprit:
            patch.setattr(os, "fsync", no_room)
        message = error_of(save_second)
    assert f"s-2 could not be saved: rank {culprit}: [Errno 28] No space left on device" in message
    assert f"The last good checkpoint, {folder / 's-1'}, is kept." in message
    assert same_on_all(message)
    assert names(folder) == ["s-1"]
    save_second()
    assert latest(manager).name == "s-2"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damaged_files(rank: int, folder: Path) -> None:
    """The ranks share the files that are to be verified, and all hear what each found."""
    world = whole_group(rank, SIZE)
    manager = CheckpointManager(folder, keep_last=5, asynchronous=False, group=world)
    share = poisoned_share(LAYOUT, rank)
    for step in (1, 2):
        save(manager, share, step)
    if rank == 0:
        damage(folder / "s-2" / "shard-00001-000.safetensors")
        (folder / "s-2" / "shard-00002-000.safetensors").unlink()
    distributed.barrier()
    with redirect_stderr(io.StringIO()) as stderr:
        saved = latest(manager)
    assert saved.name == "s-1"
    assert stderr.getvalue().count("is damaged") == (rank == 0), "it is named once"
    if rank == 0:
        assert "shard-00001-000.safetensors has changed" in stderr.getvalue()
        assert "shard-00002-000.safetensors is missing" in stderr.getvalue()
        (folder / "s-1" / "manifest.json").write_text("{")
    distributed.barrier()
    messages = [error_of(manager.latest), error_of(lambda: manager.keep(saved))]
    assert "is intact" in messages[0]
    assert "cannot be kept" in messages[1]
    assert same_on_all(messages)


def mistakes(rank: int, folder: Path) -> None:
    """Whatever one rank does wrong ends the call on all; none is left waiting."""
    world = whole_group(rank, SIZE)
    if rank == 0:
        folder.mkdir()
        (folder / "occupied").write_text("a file")
        (folder / "run").mkdir()
        (folder / "run" / "s-1.partial-12-ab").mkdir()
    distributed.barrier()
    place = folder / "occupied" / "checkpoints"
    message = error_of(lambda: CheckpointManager(place, keep_last=1, asynchronous=False, group=world))
    assert "cannot be used" in message
    assert same_on_all(message)
    manager = CheckpointManager(folder / "run", keep_last=1, asynchronous=False, group=world)
    assert names(folder / "run") == [], "leftovers are cleared"
    share = poisoned_share(LAYOUT, rank)
    save(manager, share, 1)
    tensors = share.tensors() | ({"odd": torch.zeros(2, dtype=torch.complex64)} if rank == 2 else {})

    def save_second() -> None:
        manager.save("s-2", tensors, {}, config_yaml="", permanent=False)

    assert "odd has type" in error_of(save_second, TypeError)
    wanted = poisoned_share(LAYOUT, rank)
    one_more = wanted.tensors() | ({"absent": torch.zeros(1)} if rank == 1 else {})
    message = error_of(lambda: manager.load(latest(manager), one_more))
    assert "absent, shape [1], is missing" in message
    assert same_on_all(message)
    assert wanted.is_poisoned()


def everything_that_goes_wrong(rank: int, folder: Path) -> None:
    for culprit, asynchronous in ((0, True), (1, False), (2, True)):
        a_full_disk(rank, folder / f"full-{culprit}", asynchronous=asynchronous, culprit=culprit)
    damaged_files(rank, folder / "damaged")
    mistakes(rank, folder / "mistakes")


def test_a_failure_of_one_rank_is_a_failure_of_all(tmp_path: Path) -> None:
    run_ranks(SIZE, everything_that_goes_wrong, tmp_path)


def die_while_saving(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=1, asynchronous=True, group=whole_group(rank, SIZE))
    share = poisoned_share(LAYOUT, rank)
    save(manager, share, 1)
    manager.wait()
    if rank == 1:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    save(manager, share, 2)
    manager.wait()


def test_a_rank_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank \d of 3"):
        run_ranks(SIZE, die_while_saving, tmp_path)
    assert any("s-2.partial-" in name for name in names(tmp_path))
    saved = latest(CheckpointManager(tmp_path, keep_last=1, asynchronous=False))
    assert saved.name == "s-1"
    assert names(tmp_path) == ["s-1"]
