"""The same software on every rank: versions, the code itself, the configuration.

A rank with another version of a library can train for weeks and compute something slightly different, or
hang in the first collective. What is compared is what this process has loaded, not what an image is said to
contain.
"""

import hashlib
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from torch.cuda import nccl

from launch.preflight.site import Outcome, Roster, Site, deviants
from train.config import RunConfig
from train.stored_config import config_text

PACKAGES = ("triton", "deepspeed", "transformer-engine", "safetensors", "numpy")
ROOT = Path(__file__).resolve().parents[2]
OWN_PACKAGES = ("launch", "train", "parallel", "model", "data", "configs")
NONE = "none"


def host_name() -> str:
    """Return the name under which the scheduler knows this machine, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def software(config: RunConfig) -> dict[str, str]:
    """Return by name what has to be the same everywhere; NONE for what is not there."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _installed(name) for name in PACKAGES},
        "CUDA": torch.version.cuda or NONE,
        "NCCL": _nccl(),
        "driver": _driver(),
        "git commit": _commit(),
        "code": _digest_of_code(),
        "configuration": hashlib.sha256(config_text(config).encode()).hexdigest()[:12],
    }


def check_software(site: Site) -> Outcome:
    """Compare the versions of all ranks; see `judge_software`."""
    return judge_software(site.share(software(site.config)), site.roster)


def judge_software(found: list[dict[str, str]], roster: Roster) -> Outcome:
    """Name the ranks that differ from most, for every item of `found`, which is in rank order."""
    problems: list[str] = []
    for item in found[0]:
        usual, others = deviants([each[item] for each in found])
        problems += [
            f"{item} is {value} on {roster.name(ranks)}, but {usual} on most ranks; "
            f"give all the same, or {roster.exclusion(ranks)}"
            for value, ranks in others.items()
        ]
    seen = ", ".join(f"{item} {value}" for item, value in found[0].items() if value != NONE)
    return Outcome(check="software", detail=seen, problems=tuple(problems))


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NONE


def _nccl() -> str:
    if not torch.cuda.is_available():
        return NONE
    return ".".join(str(part) for part in nccl.version())


def _driver() -> str:
    """Return the version of the kernel's NVIDIA module."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return NONE
    return next((word for word in first.split() if word[0].isdigit() and "." in word), NONE)


def _commit() -> str:
    try:
        asked = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # there is no git
        return NONE
    return asked.stdout.strip() if asked.returncode == 0 else NONE


def _digest_of_code() -> str:
    """Return a digest of our own sources, which also tells apart checkouts with changes of their own."""
    digest = hashlib.sha256()
    for package in OWN_PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
