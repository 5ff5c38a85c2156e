"""Hydra's view of `RunConfig`: registered once, so a wrong key or type fails with its path."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import RunConfig
from train.errors import RunError

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises where there is no configuration; ValueError where a group is to be a number, model=3."""
UNSAID = (
    "See https://",
    "Config search path",
    "provider=",
    "full_key:",
    "reference_type=",
    "object_type=",
)
"""How lines of a message begin that help nobody here."""
ADDING = "To append to your config"
"""How Hydra proposes to add a key; dictionaries take one, typed sections do not."""
DICTIONARY = "is not in struct"
"""What OmegaConf says of a key that a dictionary has not; of a section's it gives the type."""


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
    except COMPOSITION_ERRORS as error:
        raise composition_error(error) from error


def composition_error(error: Exception) -> RunError:
    """Return what Hydra or OmegaConf says, in one line and with the cause."""
    return RunError(f"configuration: {_in_one_line(error)}")


def to_run_config(composed: DictConfig) -> RunConfig:
    """Turn a composed configuration into typed sections; RunError names what is missing, mistyped or new."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise composition_error(error) from error
    except AttributeError as error:  # Hydra lets + and ++ add a key to a section, which has no place for it
        raise RunError(f"configuration: {error}; see docs/configs.md for the keys that it has") from error
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
        raise composition_error(error) from error
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


def _in_one_line(error: BaseException) -> str:
    """Return what Hydra says, and why: of an override that cannot be merged it is the cause that knows."""
    cause = error.__cause__
    said = [_message(error, unsaid=UNSAID if DICTIONARY in str(cause) else (*UNSAID, ADDING))]
    if cause is not None:
        said.append(_message(cause))
    elif (key := getattr(error, "full_key", None)) and key not in said[0]:
        said.insert(0, key)
    return ": ".join(said)


def _message(error: BaseException, *, unsaid: tuple[str, ...] = UNSAID) -> str:
    """Return one message as one line, without the lines that begin as one of `unsaid`."""
    if isinstance(error, MissingConfigException) and error.options:
        return f"there is no {error.missing_cfg_file}; use {', '.join(error.options)}"
    lines = [line.strip() for line in str(error).splitlines()]
    told = "; ".join(line.rstrip(".") for line in lines if line.strip("^") and not line.startswith(unsaid))
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read ({told}); write key=value, signs such as [ or = in quotes"
    return told
