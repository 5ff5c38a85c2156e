"""Hydra's view of `RunConfig`: registered once, so a wrong key or type fails with its path."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import RunConfig
from train.errors import RunError


@dataclass(frozen=True)
class SweepPoint:
    """One configuration of a sweep: the overrides that make it, and those of them that vary in the sweep."""

    overrides: list[str]
    swept: list[str]


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


def expand_sweep(overrides: Sequence[str]) -> list[SweepPoint]:
    """Return every configuration of `key=a,b`, `key=choice(…)`, `key=range(…)`: those of Hydra's --multirun.

    Several such overrides give every combination, the last one varying fastest. Without any, the only point
    has the overrides as they are. RunError for an override that cannot be read, or swept.
    """
    try:
        choices = [_choices(override) for override in overrides]
    except HydraException as error:
        raise RunError(f"configuration: {error}") from error
    swept = [index for index, texts in enumerate(choices) if texts is not None]
    columns = [[given] if texts is None else texts for given, texts in zip(overrides, choices, strict=True)]
    return [SweepPoint(list(row), [row[index] for index in swept]) for row in product(*columns)]


def _choices(text: str) -> list[str] | None:
    """Return the overrides that one stands for; None when it does not vary."""
    (override,) = OverridesParser.create().parse_overrides([text])
    if not override.is_sweep_override():
        return None
    if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
        raise RunError(f"{text}: only lists, choice(…) and range(…) of values can be swept; write key=a,b")
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
