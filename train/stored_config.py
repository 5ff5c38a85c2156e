"""The configuration of an existing run, as it stands beside its checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def changed_settings(path: Path, config: RunConfig) -> list[str]:
    """Return what `config` says otherwise than the `config.yaml` at `path`: `key=new (was old)` each.

    The file may be of another version of this program, whose keys are not all known here. Raises OSError.
    """
    before = dict(_flatten(OmegaConf.to_container(OmegaConf.load(path)), ""))
    now = dict(_flatten(OmegaConf.to_container(OmegaConf.create(config_text(config))), ""))
    return [
        f"{key}={_shown(now, key)} (was {_shown(before, key)})"
        for key in sorted(before.keys() | now.keys())
        if _shown(before, key) != _shown(now, key)
    ]


def _flatten(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def _shown(values: dict[str, Any], key: str) -> str:
    return "null" if values.get(key) is None else str(values[key])
