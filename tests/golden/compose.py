"""The recipes as they compose, and the command that rewrites their golden files:

python -m tests.golden.compose
"""

from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from train.config import RunConfig
from train.config_store import compose_run as _compose_run
from train.config_store import register

RECIPES = ("smoke", "single_gpu", "v3_16b", "deepseek_v3")
FOLDER = Path(__file__).parent / "configs"


def compose_run(*overrides: str) -> RunConfig:
    """Return the typed configuration of `python -m train OVERRIDES`."""
    return _compose_run(overrides)


def golden_text(recipe: str) -> str:
    """Return the composed configuration of a recipe as YAML."""
    return OmegaConf.to_yaml(_compose((f"recipe={recipe}",)), resolve=True)


def _compose(overrides):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("configs", version_base="1.3"):
        return compose("config", overrides=list(overrides))


if __name__ == "__main__":
    for name in RECIPES:
        (FOLDER / f"{name}.yaml").write_text(golden_text(name), encoding="utf-8")
        print(FOLDER / f"{name}.yaml")
