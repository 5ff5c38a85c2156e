"""The checkpoint manager: isolated from training, complete or absent, never silently wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.checkpoints import manager as checkpoint_module
from train.checkpoints.manager import CheckpointManager, newest_intact
from train.errors import RunError


def state(value: float) -> dict[str, Tensor]:
    return {
        "model.w": torch.full((64, 3), value),
        "optim.w.exp_avg": torch.full((64, 3), value, dtype=torch.bfloat16),
        "model.bias": torch.full((5,), value),
        "count": torch.tensor(int(value)),
    }


def save(manager: CheckpointManager, step: int, *, permanent: bool = False) -> None:
    manager.save(
        f"stage-{step:08d}",
        state(step),
        {"step": step, "stage": "stage", "start": {"code": 7}},
        config_yaml=f"name: run-{step}\n",
        permanent=permanent,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(manager: CheckpointManager, step: int) -> None:
    """The newest intact checkpoint is that of `step`, in every tensor."""
    saved = manager.latest()
    assert saved is not None
    assert (saved.name, saved.progress["step"]) == (f"stage-{step:08d}", step)
    loaded = {
        name: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -1)
        for name, tensor in state(0).items()
    }
    manager.load(saved, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state(step).items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_and_loads(folder: Path, asynchronous: bool) -> None:
    manager = CheckpointManager(folder, keep_last=3, asynchronous=asynchronous)
    assert manager.latest() is None
    save(manager, 1)
    save(manager, 2, permanent=True)
    manager.wait()
    assert_holds(manager, 2)
    saved = manager.latest()
    assert saved is not None
    assert saved.permanent
    assert saved.progress == {"step": 2, "stage": "stage", "start": {"code": 7}}
    assert (saved.path / "config.yaml").read_text() == "name: run-2\n"
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert manifest["tensors"]["optim.w.exp_avg"] == "bfloat16[64, 3]"
    assert set(manifest["files"]) | {"manifest.json"} == set(names(saved.path))


def test_progress_must_survive_json(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=1, asynchronous=False)
    for progress in ({1: "a number as key"}, {"shape": (1, 2)}, {"loss": float("nan")}):
        with pytest.raises(TypeError, match="plain JSON"):
            manager.save("x-1", {}, progress, config_yaml="", permanent=False)  # type: ignore[arg-type]
    assert names(folder) == []


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Background writes wait until this event is set."""
    released = threading.Event()
    write = checkpoint_module.save_tensors

    def wait_then_write(*args: object, **kwargs: object) -> object:
        assert released.wait(20)
        return write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_module, "save_tensors", wait_then_write)
    yield released
    released.set()


def test_training_may_go_on_while_a_checkpoint_is_written(folder: Path, held: threading.Event) -> None:
    manager = CheckpointManager(folder, keep_last=2, asynchronous=True)
    tensors = state(4)
    progress = {"step": 4, "nested": {"list": [1]}}
    manager.save("stage-00000004", tensors, progress, config_yaml="", permanent=False)
    for tensor in tensors.values():
        tensor.fill_(99)  # the next step
    progress["nested"]["list"].append(2)  # type: ignore[index]
    held.set()
    manager.wait()
    assert_holds(manager, 4)
    saved = manager.latest()
    assert saved is not None
    assert saved.progress["nested"] == {"list": [1]}


def test_at_most_one_save_is_in_flight(folder: Path, held: threading.Event) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=True)
    save(manager, 1)
    second = threading.Thread(target=save, args=(manager, 2))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # it waits for the first
    assert [name for name in names(folder) if "partial" not in name] == []
    held.set()
    second.join(20)
    manager.wait()
    assert names(folder) == ["stage-00000001", "stage-00000002"]


def test_keeps_the_last_and_the_permanent(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=2, asynchronous=True)
    for step in range(1, 8):
        save(manager, step, permanent=step in (2, 3))
    manager.wait()
    assert names(folder) == [f"stage-{step:08d}" for step in (2, 3, 6, 7)]


def test_a_checkpoint_is_renamed_before_it_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it removes files never leaves half a checkpoint under its name."""
    removed: list[str] = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, ignore_errors: path.exists() and removed.append(path.name)
    )
    manager = CheckpointManager(folder, keep_last=1, asynchronous=False)
    for step in (1, 2, 2):
        save(manager, step)
    assert {name.rpartition("-")[0].rpartition("-")[0] for name in removed} == {
        "stage-00000001.removed",
        "stage-00000002.replaced",
    }


def test_a_checkpoint_of_the_same_name_is_replaced(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=2, asynchronous=False)
    save(manager, 1)
    manager.save("stage-00000001", state(5), {"step": 5}, config_yaml="", permanent=True)
    assert names(folder) == ["stage-00000001"]
    saved = manager.latest()
    assert saved is not None
    assert (saved.permanent, saved.progress) == (True, {"step": 5})


def test_newest_is_by_order_of_saving_not_by_name(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=9, asynchronous=False)
    for name in ("pretrain-00000009", "extend-00000010", "a-00000011"):
        manager.save(name, state(1), {"step": name}, config_yaml="", permanent=False)
        again = CheckpointManager(folder, keep_last=9, asynchronous=False)
        saved = again.latest()
        assert saved is not None
        assert saved.name == name


# ---- damage ---------------------------------------------------------------------------------------------


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


def test_the_end_of_a_stage_is_found_by_its_name(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=False)
    for name, permanent in (("one-00000001", True), ("one-two-00000002", True), ("one-00000003", False)):
        manager.save(name, state(1), {}, config_yaml="", permanent=permanent)
    found = [newest_intact(folder, stage=stage) for stage in ("one", "one-two", "two")]
    assert [saved.name if saved else None for saved in found] == ["one-00000001", "one-two-00000002", None]


# ---- a disk that does not cooperate, a process that dies ------------------------------------------------


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
    """A file system of 256 KiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


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
