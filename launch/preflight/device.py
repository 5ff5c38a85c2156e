"""The accelerators: one for each rank, all of one kind, empty, and well by their own account.

nvidia-smi knows what torch does not: uncorrected memory errors, rows that memory wants to replace, and what
slows the clocks down. Where it is absent, or does not know an item, nothing is said about it. On a CPU there
is nothing to check.
"""

import csv
import io
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from launch.preflight.site import Outcome, Roster, Site, deviants
from train.build import pick_device
from train.config import RunConfig
from train.errors import RunError

MIN_FREE = 0.90
"""Share of an accelerator's memory that has to be free: its driver and this process take a little."""

QUERIES = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the driver was loaded",
    "remapped_rows.pending": "memory rows wait for a reset to be replaced",
    "remapped_rows.failure": "memory rows could not be replaced",
    "clocks_throttle_reasons.hw_slowdown": "slowed down by the hardware (heat or power)",
    "clocks_throttle_reasons.sw_thermal_slowdown": "slowed down by the driver because of heat",
}
"""Items of nvidia-smi that are 0, No or Not Active on a healthy accelerator, and what they mean otherwise."""

HEALTHY = ("0", "no", "not active")
UNKNOWN = ("", "n/a", "[n/a]", "not supported", "[not supported]")


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What a rank knows of its device. free, total: bytes; ailments: what nvidia-smi complains about."""

    kind: str
    uuid: str
    free: int
    total: int
    ailments: list[str] = field(default_factory=list)


def usable_device(config: RunConfig, *, local_rank: int) -> tuple[torch.device, str]:
    """Return the device that training would use; the CPU and the reason where that one does not work."""
    try:
        device = pick_device(config, local_rank=local_rank)
        torch.ones(1, device=device).sum().item()
    except (RunError, RuntimeError) as error:
        return torch.device("cpu"), str(error).strip().splitlines()[0]
    return device, ""


def check_devices(site: Site) -> Outcome:
    """Look at the device of every rank."""
    found = site.share((site.device_error, _accelerator(site.team.device)))
    errors = [error for error, _ in found]
    devices = [Accelerator(**device) if device else None for _, device in found]
    return judge_devices(devices, errors, site.roster)


def judge_devices(devices: Sequence[Accelerator | None], errors: Sequence[str], roster: Roster) -> Outcome:
    """Name the ranks whose device fails, is shared, is of another kind, is not empty, or ails.

    devices: by rank, None for a CPU. errors: by rank, why the device cannot be used, "" where it can.
    """
    if not any(devices) and not any(errors):
        return Outcome(check="devices", detail="no accelerator: not checked", skipped=True)
    problems = [
        f"{roster.name([rank])} cannot use its device: {error}; {roster.exclusion([rank])}"
        for rank, error in enumerate(errors)
        if error
    ]
    usual, others = deviants([device.kind if device else "a CPU" for device in devices])
    problems += [
        f"{roster.name(ranks)}: {kind}, but {usual} on most ranks; {roster.exclusion(ranks)}"
        for kind, ranks in others.items()
        if not all(errors[rank] for rank in ranks)
    ]
    problems += _shared(devices, roster)
    for rank, device in enumerate(devices):
        if device:
            problems += [
                f"{roster.name([rank])}: {line}; {roster.exclusion([rank])}" for line in _ails(device)
            ]
    return Outcome(check="devices", detail=f"{len(devices)} × {usual}", problems=tuple(problems))


def read_ailments(uuid: str) -> list[str]:
    """Return what nvidia-smi finds wrong with an accelerator, in words; nothing where it cannot be asked."""
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [] if isinstance(error, FileNotFoundError) else [f"nvidia-smi fails: {error}"]
    row = next(csv.reader(io.StringIO(asked.stdout), skipinitialspace=True), [])
    if asked.returncode != 0 or len(row) != len(QUERIES):
        return [f"nvidia-smi ends with {asked.returncode}: {asked.stdout.strip()[:100]}"]
    pairs = zip(QUERIES.values(), row, strict=True)
    return [
        f"{meaning} ({value.strip()})"
        for meaning, value in pairs
        if value.strip().lower() not in (*HEALTHY, *UNKNOWN)
    ]


def _accelerator(device: torch.device) -> dict[str, object] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    uuid = f"GPU-{properties.uuid}"
    return asdict(
        Accelerator(kind=properties.name, uuid=uuid, free=free, total=total, ailments=read_ailments(uuid))
    )


def _ails(device: Accelerator) -> list[str]:
    full = device.free < MIN_FREE * device.total
    taken = f"{(device.total - device.free) / 1e9:.1f} of {device.total / 1e9:.1f} GB are taken by others"
    return [*([taken] if full else []), *device.ailments]


def _shared(devices: Sequence[Accelerator | None], roster: Roster) -> list[str]:
    users: dict[str, list[int]] = {}
    for rank, device in enumerate(devices):
        if device:
            users.setdefault(device.uuid, []).append(rank)
    return [
        f"{roster.name(ranks)} share one accelerator, {uuid}; start one process for each, "
        "with LOCAL_RANK counted on each host"
        for uuid, ranks in users.items()
        if len(ranks) > 1
    ]
