"""Small checkpoints for tests, and what must be in them."""

from pathlib import Path

import torch
from torch import Tensor

from train.checkpoints.manager import CheckpointManager


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
