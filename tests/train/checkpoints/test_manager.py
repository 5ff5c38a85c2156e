"""The checkpoint manager: isolated from training, complete or absent, kept and removed as asked."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.checkpoints.saved import assert_holds, names, save, state
from train.checkpoints import manager as checkpoint_module
from train.checkpoints.manager import CheckpointManager, newest_intact


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


def test_the_newest_checkpoint_is_the_one_still_being_written(folder: Path, held: threading.Event) -> None:
    """A stage begins with the end of the one before it, which is written in the background."""
    manager = CheckpointManager(folder, keep_last=2, asynchronous=True)
    held.set()
    save(manager, 1)
    manager.wait()
    held.clear()
    save(manager, 2)
    threading.Timer(0.3, held.set).start()
    saved = manager.latest()
    assert saved is not None
    assert saved.name == "stage-00000002"


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


def test_the_end_of_a_stage_is_found_by_its_name(folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=5, asynchronous=False)
    for name, permanent in (("one-00000001", True), ("one-two-00000002", True), ("one-00000003", False)):
        manager.save(name, state(1), {}, config_yaml="", permanent=permanent)
    found = [newest_intact(folder, stage=stage) for stage in ("one", "one-two", "two")]
    assert [saved.name if saved else None for saved in found] == ["one-00000001", "one-two-00000002", None]
