"""The folder for checkpoints: writable and the same on all hosts, with room for what the run will write.

The leader makes the folder as training would, and a file with a secret in it. Every rank reads the secret and
writes a file of its own, as it will write its own shard; the leader looks whether all files have arrived.
Everything that was made is removed again.

Room: a checkpoint holds FP32 masters, the two moments, router biases and, where one is kept, the moving
average. At the worst moment there are the last `keep_last`, the one being written, and the end of every
stage before the last. What earlier checkpoints of the same run take counts as room.
"""

import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.preflight.site import Outcome, Roster, Site
from model.cost import FP32_BYTES, num_moe_layers, num_parameters
from train.config import Moments, RunConfig

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class View:
    """The folder as one rank sees it: its absolute path, free bytes, and what went wrong, "" if nothing."""

    path: str
    free: int = 0
    error: str = ""


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of the tensors of one checkpoint."""
    model, optimizer = config.model, config.optimizer
    moment = FP32_BYTES if optimizer.moments is Moments.fp32 else 2
    average = 0 if optimizer.ema_decay is None else FP32_BYTES
    biases = FP32_BYTES * num_moe_layers(model) * model.moe.num_experts
    return (FP32_BYTES + 2 * moment + average) * num_parameters(model) + biases


def needed_bytes(config: RunConfig) -> int:
    """Return the bytes of all checkpoints of the run at the worst moment."""
    earlier_ends = max(0, len(config.stages) - 1)
    return (config.checkpoint.keep_last + 1 + earlier_ends) * checkpoint_bytes(config)


def check_folder(site: Site) -> Outcome:
    """Write and read in the folder from every rank."""
    folder = Path(site.config.root).absolute() / site.config.name / "checkpoints"
    team = site.team
    made: list[Path] = []
    secret, mistake, held = secrets.token_hex(8), "", 0
    if team.leads:
        made, mistake = _begin(folder, secret)
        held = _size(folder)
    secret, mistake, held = site.share((secret, mistake, held))[0]
    view = View(path=str(folder)) if mistake else _look(folder, secret, team.processes.rank)
    views = [View(**each) for each in site.share(asdict(view))]
    seen = [_own_file(folder, secret, rank).exists() for rank in range(len(views) if team.leads else 0)]
    arrived = site.share(seen)[0]
    with suppress(OSError):  # also of one that was written in part, on a full disk
        _own_file(folder, secret, team.processes.rank).unlink(missing_ok=True)
    team.world.barrier()
    if team.leads:
        _clean(folder, secret, made)
    outcome = judge_folder(views, arrived, site.roster, needed=needed_bytes(site.config), held=held)
    if not mistake:
        return outcome
    problem = f"{folder} cannot be used by rank 0 ({site.roster.hosts[0]}): {mistake}; use another root="
    return Outcome(check="checkpoint folder", detail=str(folder), problems=(problem,))


def judge_folder(
    views: list[View], arrived: list[bool], roster: Roster, *, needed: int, held: int
) -> Outcome:
    """Name the ranks that cannot use the folder, that use another one, and the hosts without room.

    Args:
        views: by rank.
        arrived: by rank, whether the leader sees the file that the rank wrote.
        roster: names.
        needed: bytes of all checkpoints.
        held: bytes of those already there.
    """
    problems: list[str] = []
    by_error: dict[str, list[int]] = {}
    for rank, view in enumerate(views):
        if view.error:
            by_error.setdefault(view.error, []).append(rank)
    for error, ranks in by_error.items():
        problems.append(
            f"{roster.name(ranks)}: {error}; give root= a folder that every host shares and may write to, "
            f"or {roster.exclusion(ranks)}"
        )
    lost = [rank for rank, view in enumerate(views) if not view.error and not arrived[rank]]
    if lost:
        problems.append(
            f"{roster.name(lost)} wrote a file that rank 0 does not see, so the folder is not the same one; "
            f"give root= a folder that every host shares, or {roster.exclusion(lost)}"
        )
    room = {rank: view.free + held for rank, view in enumerate(views) if not view.error}
    tight = [rank for rank, free in room.items() if free < needed]
    if tight:
        least = min(room[rank] for rank in tight)
        problems.append(
            f"{views[tight[0]].path} has room for {least / GB:,.1f} GB on {roster.name(tight)}, but the "
            f"checkpoints of the run take up to {needed / GB:,.1f} GB; free space, use another root=, "
            f"or lower checkpoint.keep_last"
        )
    least = min(room.values(), default=0)
    detail = f"{views[0].path}: {least / GB:,.1f} GB free, {needed / GB:,.3g} GB needed"
    return Outcome(check="checkpoint folder", detail=detail, problems=tuple(problems))


def _begin(folder: Path, secret: str) -> tuple[list[Path], str]:
    """Make the folder and the leader's file; return the folders that were made, and what went wrong."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _secret_file(folder, secret).write_text(secret, encoding="utf-8")
    except OSError as error:
        return made, str(error)
    return made, ""


def _look(folder: Path, secret: str, rank: int) -> View:
    path = str(folder)
    try:
        read = _secret_file(folder, secret).read_text(encoding="utf-8")
    except OSError as error:
        return View(path=path, error=f"{folder} does not show what rank 0 wrote there ({error.strerror})")
    if read != secret:
        return View(path=path, error=f"{folder} gives back other bytes than rank 0 wrote there")
    try:
        _own_file(folder, secret, rank).write_text(secret, encoding="utf-8")
        return View(path=path, free=shutil.disk_usage(folder).free)
    except OSError as error:
        return View(path=path, error=f"{folder} cannot be written to ({error.strerror})")


def _clean(folder: Path, secret: str, made: list[Path]) -> None:
    with suppress(OSError):
        _secret_file(folder, secret).unlink(missing_ok=True)
    for path in made:
        with suppress(OSError):  # somebody else uses it by now
            path.rmdir()


def _secret_file(folder: Path, secret: str) -> Path:
    return folder / f".preflight-{secret}"


def _own_file(folder: Path, secret: str, rank: int) -> Path:
    return folder / f".preflight-{secret}-{rank}"


def _size(folder: Path) -> int:
    """Return the bytes of all files; an old checkpoint may be removed meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
