"""The configuration of an existing run, as it stands beside its checkpoints."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from train.config import RunConfig
from train.config_store import to_run_config
from train.errors import RunError


def config_text(config: RunConfig) -> str:
    """Return the YAML that `read_config` reads back to an equal `RunConfig`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def read_config(path: Path) -> RunConfig:
    """Read a `config.yaml`; RunError when it is absent, unreadable or not a run's."""
    try:
        stored = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), stored)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist; name a run directory or a checkpoint folder") from error
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise RunError(f"{path} is not the configuration of a run: {error}") from error
    return to_run_config(merged)  # type: ignore[arg-type]  # merging structured configs gives a DictConfig
