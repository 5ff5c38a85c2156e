"""Which stage of a run comes next, where its data begins, and how its sources are mixed."""

from train.config import RunConfig, StageConfig
from train.errors import RunError
from train.state import TrainState


def remaining(config: RunConfig, state: TrainState) -> list[str]:
    """Return the stages that still have tokens to train on, in run order.

    A stage before the current one is finished whatever its budget says now; the current one is
    finished when its budget is spent, so raising `num_tokens` of the last stage continues a run.
    RunError when the configuration no longer has the stage the run stands in.
    """
    names = list(config.stages)
    if not state.stage:
        return names
    if state.stage not in names:
        raise RunError(
            f"the run stands in stage {state.stage!r}, which the configuration does not have (stages: "
            f"{', '.join(names)}); give the recipe it was started with, or another name="
        )
    current = names.index(state.stage)
    if state.stage_tokens < config.stages[state.stage].num_tokens:
        return names[current:]
    return names[current + 1 :]


def previous(config: RunConfig, stage: str) -> str | None:
    """Return the stage before `stage`, or None for the first."""
    names = list(config.stages)
    position = names.index(stage)
    return names[position - 1] if position else None


def source_weights(config: RunConfig, stage: StageConfig) -> dict[str, float]:
    """Return the weight of every source in `stage`: its own where it gives one, else that of data.sources."""
    own = stage.source_weights
    return {name: own.get(name, source.weight) for name, source in config.data.sources.items()}
