"""Whenever a process is killed, a whole checkpoint is left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.checkpoints.saved import assert_holds, names, save
from train.checkpoints.manager import CheckpointManager, newest_intact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def die_at_the_nth_call(module: object, name: str, number: int) -> None:
    """Replace a function by one that kills this process instead of its `number`-th call."""
    function, calls = getattr(module, name), iter(range(1 << 30))

    def wrapped(*args: object, **kwargs: object) -> object:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, wrapped)


def save_in_a_child(folder: Path, *, die: tuple[object, str, int], step: int) -> int:
    """Fork; the child saves `step` and is killed on the way. Return how it ended."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        manager = CheckpointManager(folder, keep_last=1, asynchronous=False)
        die_at_the_nth_call(*die)
        save(manager, step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("same_name", [False, True])
def test_killed_at_any_moment_a_whole_checkpoint_is_left(folder: Path, same_name: bool) -> None:
    """Every file flushed, every rename and every removal is a point of death once."""
    endings: list[int] = []
    for module, name in ((os, "fsync"), (Path, "rename"), (shutil, "rmtree"), (Path, "mkdir")):
        for number in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            first = CheckpointManager(folder, keep_last=1, asynchronous=False)
            save(first, 2 if same_name else 1)
            endings.append(save_in_a_child(folder, die=(module, name, number), step=2))
            after = CheckpointManager(folder, keep_last=1, asynchronous=False)
            saved = after.latest()
            assert saved is not None, (name, number)
            assert_holds(after, saved.progress["step"])
            assert not [path for path in names(folder) if "." in path], "leftovers are cleared"
            if endings[-1] == 0:
                break
    assert endings.count(0) == 4  # for each function, also a child that outlived its last call
    assert endings.count(-signal.SIGKILL) >= 10


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
from train.checkpoints.manager import CheckpointManager

torch.set_num_threads(1)
manager = CheckpointManager(Path(sys.argv[1]), keep_last=2, asynchronous=True)
for step in range(1, 100_000):
    tensors = {"w": torch.full((200_000,), float(step)), "n": torch.tensor(step)}
    manager.save(f"s-{step:08d}", tensors, {"step": step}, config_yaml="", permanent=False)
    print(step, flush=True)
"""


def test_kill_from_outside_while_saving(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(4):  # the third save has returned, so the second is complete; the fourth is on its way
        process.stdout.readline()
    time.sleep(0.003)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    process.stdout.close()
    manager = CheckpointManager(folder, keep_last=2, asynchronous=True)
    saved = manager.latest()
    assert saved is not None
    assert saved.progress["step"] >= 3
    loaded = {"w": torch.full((200_000,), float("nan")), "n": torch.tensor(-1)}
    manager.load(saved, loaded)
    assert (loaded["w"] == saved.progress["step"]).all()
    assert loaded["n"] == saved.progress["step"]


def test_leftovers_of_a_killed_process_are_cleared_at_the_next_start(folder: Path) -> None:
    save(CheckpointManager(folder, keep_last=2, asynchronous=False), 1)
    for name in (
        "stage-00000002.partial-12-ab",
        "stage-00000000.removed-12-ab",
        "stage-00000001.replaced-1-a",
    ):
        shutil.copytree(folder / "stage-00000001", folder / name)
    assert newest_intact(folder) is not None  # looking does not touch what another process may be writing
    assert len(names(folder)) == 4
    CheckpointManager(folder, keep_last=2, asynchronous=False)
    assert names(folder) == ["stage-00000001"]
    (folder / "stage-00000001").rename(folder / "stage-00000001.replaced-1-a")
    assert_holds(CheckpointManager(folder, keep_last=2, asynchronous=False), 1)
