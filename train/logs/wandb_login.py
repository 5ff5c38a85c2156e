"""Whether Weights & Biases is used and where it writes, decided without importing it."""

import configparser
import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from train.config import WandbMode

PUBLIC_SERVERS = ("api.wandb.ai", "api.forge.coreweave.com")
"""The public W&B server under its old name and the one that wandb 0.31 uses."""


def resolve_mode(mode: WandbMode, environ: Mapping[str, str]) -> WandbMode:
    """Return ONLINE, OFFLINE or DISABLED; AUTO follows WANDB_MODE when set, else whether there is a login."""
    if mode is not WandbMode.auto:
        return mode
    match environ.get("WANDB_MODE"):
        case "disabled":
            return WandbMode.disabled
        case "offline" | "dryrun":
            return WandbMode.offline
        case _:
            return WandbMode.online if logged_in(environ) else WandbMode.offline


def logged_in(environ: Mapping[str, str]) -> bool:
    """Return whether WANDB_API_KEY is set or netrc has a password for the W&B server that is used."""
    if environ.get("WANDB_API_KEY"):
        return True
    home = Path(environ.get("HOME", "~")).expanduser()
    path = Path(environ.get("NETRC") or home / ".netrc").expanduser()
    if not path.is_file():
        return False
    try:
        logins = netrc.netrc(path)
    except netrc.NetrcParseError:
        # wandb cannot read it either: there is no login, and a run need not fail for that.
        return False
    return any(logins.authenticators(server) is not None for server in _servers(environ, home))


def _servers(environ: Mapping[str, str], home: Path) -> tuple[str, ...]:
    """Return the hosts whose login counts: the one that was chosen, else the names of the public server."""
    address = environ.get("WANDB_BASE_URL")
    if address is None:
        # `wandb login --host` stores a server of one's own here.
        settings = configparser.ConfigParser(interpolation=None)
        settings.read(Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings")
        address = settings.get("default", "base_url", fallback=None)
    host = urlparse(address).hostname if address is not None else None
    return PUBLIC_SERVERS if host is None else (host,)
