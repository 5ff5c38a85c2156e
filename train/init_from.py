"""Starting a run from the weights of another: continued pretraining, or an imported open-weights model."""

from pathlib import Path

from train.build import StageParts
from train.checkpoints.storage import load_tensors
from train.load import find_checkpoint


def load_initial_weights(parts: StageParts, path: Path) -> None:
    """Copy weights and router biases of a run, RUN@STAGE or checkpoint folder; its optimizer state is left.

    RunError naming every tensor that is missing, extra or misshaped, when it is another model.
    """
    folder = find_checkpoint(path).path
    load_tensors(folder, parts.weights(), prefix="model.", group=parts.mesh.world)
    parts.engine.use_loaded(num_updates=0)
    if parts.ema:
        parts.ema.restart(parts.engine.masters())
