"""Starting a run from the weights of another: continued pretraining, or an imported open-weights model."""

from pathlib import Path

from train.build import StageParts
from train.checkpoints.storage import load_tensors
from train.load import find_checkpoint


def load_initial_weights(parts: StageParts, path: Path) -> None:
    """Copy weights and router biases of a run, RUN@STAGE or checkpoint folder; its optimizer state is left.

    RunError naming every tensor that is missing, extra or misshaped, when it is another model.
    """
    load_tensors(find_checkpoint(path).path, parts.weights(), prefix="model.")
    parts.use_loaded(num_updates=0)
    if parts.ema:
        parts.ema.restart(parts.masters())
