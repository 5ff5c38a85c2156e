"""Every process group of the layout, at its own collective: are values right, and is a group slow?

Groups of one axis do the same work side by side, so they should take as long as each other. A host is to
blame where it takes part in every slow group of an axis, and in none of the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.preflight.layout import layouts
from launch.preflight.site import Outcome, Roster, Site
from parallel.mesh import build_mesh
from parallel.preflight.exercise import Exercise, exercise_all
from parallel.preflight.uses import Use, uses, world_uses

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One operation on the groups of one axis that ran side by side, each as its slowest member saw it."""

    name: str
    operation: str
    groups: dict[tuple[int, ...], Exercise]

    @property
    def median(self) -> Exercise:
        """Return the group of median time, of an even number the faster of the middle two."""
        ordered = sorted(self._timed, key=lambda each: each.seconds)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def slowest(self) -> Exercise:
        """Return the group that took longest."""
        return max(self._timed, key=lambda each: each.seconds)

    @property
    def _timed(self) -> list[Exercise]:
        """Return the groups that were timed; all of them where the operation failed on each."""
        return [each for each in self.groups.values() if not each.error] or list(self.groups.values())

    def slow(self, slow_percent: float) -> list[Exercise]:
        """Return the groups that took slow_percent longer than the median."""
        limit = self.median.seconds * (1 + slow_percent / 100)
        return [each for each in self.groups.values() if each.seconds > limit]


def check_groups(site: Site) -> tuple[Outcome, list[Axis]]:
    """Run what training runs on every group; the world alone where no layout can be built."""
    team = site.team
    own = exercise_all(_planned(site), world=team.world, device=team.device, num_bytes=site.num_bytes)
    found = _restored(site.share([_shortened(each, team.processes.rank) for each in own]))
    return judge_groups(found, site.roster, slow_percent=site.slow_percent), axes_of(found)


def judge_groups(found: Sequence[Sequence[Exercise]], roster: Roster, *, slow_percent: float) -> Outcome:
    """Name the groups that failed, gave wrong values, or took longer than others of their axis.

    found: what every rank saw, by rank; slow_percent: how much more than the median is too much.
    """
    axes = axes_of(found)
    if not axes:
        return Outcome(check="groups", detail="one process: nothing is exchanged", skipped=True)
    problems = [
        f"{roster.name([rank])}: {each.operation} over {each.group} failed ({each.error}); "
        f"{roster.exclusion([rank])}"
        for rank, seen in enumerate(found)
        for each in seen
        if each.error
    ]
    for axis in axes:
        problems += _wrong_values(axis, roster)
        problems += _stragglers(axis, roster, slow_percent=slow_percent)
    tried = f"{sum(len(axis.groups) for axis in axes)} groups, {len(axes)} kinds of exchange"
    sent = axes[0].median.num_bytes / 1e6
    return Outcome(
        check="groups",
        detail=f"{tried}, {sent:.3g} MB each; {slow_percent:g} % allowed",
        problems=tuple(problems),
    )


def axes_of(found: Sequence[Sequence[Exercise]]) -> list[Axis]:
    """Put together what the members of each group saw, and the groups that ran side by side."""
    turns: dict[int, dict[tuple[int, ...], Exercise]] = {}
    for each in (each for seen in found for each in seen):
        groups = turns.setdefault(each.turn, {})
        known = groups.get(each.ranks)
        groups[each.ranks] = _together(known, each) if known else each
    return [
        Axis(name=first.group, operation=first.operation, groups=groups)
        for groups in (turns[turn] for turn in sorted(turns))
        for first in [next(iter(groups.values()))]
    ]


def _planned(site: Site) -> Iterator[Use]:
    team = site.team
    fitting = layouts(site.config, team.world.size) if site.agreed else []
    if not fitting:
        yield from world_uses(team.world)
    for config, layout in fitting:
        mesh = build_mesh(layout, rank=team.processes.rank, trace=team.trace)
        team.watchdog.groups = mesh.members()
        yield from uses(mesh, config)


def _wrong_values(axis: Axis, roster: Roster) -> Iterator[str]:
    for each in axis.groups.values():
        if not each.wrong:
            continue
        blamed = each.senders or each.ranks
        source = f"from {roster.name(each.senders)}" if each.senders else "from one of them, unknown which"
        yield (
            f"{axis.operation} over {axis.name} of {roster.name(each.ranks)} gave up to {each.wrong} wrong "
            f"values, {source}; {roster.exclusion(blamed)}"
        )


def _stragglers(axis: Axis, roster: Roster, *, slow_percent: float) -> Iterator[str]:
    slow = axis.slow(slow_percent)
    fast = {rank for ranks in axis.groups if axis.groups[ranks] not in slow for rank in ranks}
    suspects = {roster.hosts[rank] for each in slow for rank in each.ranks}
    suspects -= {roster.hosts[rank] for rank in fast}
    for each in slow:
        blamed = [rank for rank in each.ranks if roster.hosts[rank] in suspects] or each.ranks
        times = each.seconds / axis.median.seconds
        yield (
            f"{axis.operation} over {axis.name} of {roster.name(each.ranks)} takes {each.seconds * 1e3:.2f} "
            f"ms, {times:.2f} times the median of {len(axis.groups)} groups, at {each.busbw / GB:.3g} GB/s; "
            f"{roster.exclusion(blamed)}"
        )


def _together(one: Exercise, other: Exercise) -> Exercise:
    """Return the worse of what two members of a group saw."""
    return Exercise(
        turn=one.turn,
        group=one.group,
        operation=one.operation,
        ranks=one.ranks,
        num_bytes=one.num_bytes,
        seconds=max(one.seconds, other.seconds),
        wrong=max(one.wrong, other.wrong),
        senders=tuple(sorted({*one.senders, *other.senders})),
        error=one.error or other.error,
    )


def _shortened(each: Exercise, rank: int) -> dict[str, Any]:
    """Return it for JSON; only the first member spells out the ranks, which are thousands in a large job."""
    return asdict(each) | {"ranks": each.ranks if rank == each.ranks[0] else each.ranks[:1]}


def _restored(told: Sequence[Sequence[dict[str, Any]]]) -> list[list[Exercise]]:
    """Return what `_shortened` shortened."""
    every = [each for seen in told for each in seen]
    spelt = {(each["turn"], each["ranks"][0]): each["ranks"] for each in every if len(each["ranks"]) > 1}

    def restored(each: dict[str, Any]) -> Exercise:
        ranks = tuple(spelt[each["turn"], each["ranks"][0]])
        whole: dict[str, Any] = each | {"ranks": ranks, "senders": tuple(each["senders"])}
        return Exercise(**whole)

    return [[restored(each) for each in seen] for seen in told]
