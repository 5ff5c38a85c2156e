"""Whether Weights & Biases is used and where it writes, decided without importing it."""

import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from train.config import WandbMode


def resolve_mode(mode: WandbMode, environ: Mapping[str, str]) -> WandbMode:
    """Return ONLINE, OFFLINE or DISABLED; AUTO follows WANDB_MODE when set, else whether there is a login."""
    if mode is not WandbMode.AUTO:
        return mode
    match environ.get("WANDB_MODE"):
        case "disabled":
            return WandbMode.DISABLED
        case "offline" | "dryrun":
            return WandbMode.OFFLINE
        case _:
            return WandbMode.ONLINE if logged_in(environ) else WandbMode.OFFLINE


def logged_in(environ: Mapping[str, str]) -> bool:
    """Return whether WANDB_API_KEY is set or netrc has a password for the W&B server."""
    if environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    if server is None or not path.is_file():
        return False
    try:
        return netrc.netrc(path).authenticators(server) is not None
    except netrc.NetrcParseError:
        # wandb cannot read it either: there is no login, and a run need not fail for that.
        return False
