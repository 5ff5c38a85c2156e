"""Hydra's view of `RunConfig`: registered once, so a wrong key or type fails with its path."""

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import RunConfig
from train.errors import RunError


def register() -> None:
    """Make `RunConfig` the schema that `configs/config.yaml` starts from."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of `python -m train OVERRIDES`; RunError where there is none."""
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("configs", version_base="1.3"):
            return to_run_config(compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise RunError(f"configuration: {error}") from error


def to_run_config(composed: DictConfig) -> RunConfig:
    """Turn a composed configuration into typed sections; RunError names a missing or mistyped value."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise RunError(f"configuration: {error}") from error
    if not isinstance(config, RunConfig):
        raise RunError(
            "configuration: the composed root is not a run; start configs/config.yaml from run_schema"
        )
    return config
