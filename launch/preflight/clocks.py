"""The clocks of the hosts: logs are merged, and files compared, by time."""

import statistics
from collections.abc import Sequence

from launch.preflight.site import Outcome, Roster, Site
from parallel.preflight.clocks import Offset, clock_offsets


def check_clocks(site: Site) -> Outcome:
    """Ask the first rank of every host for the time."""
    peers = [rank for rank in site.roster.first_ranks() if rank > 0]
    offsets = clock_offsets(site.team.world, peers, clock=site.clock)
    told = site.share([(each.rank, each.seconds, each.error_s) for each in offsets])[0]
    known = [Offset(rank=rank, seconds=seconds, error_s=error_s) for rank, seconds, error_s in told]
    return judge_clocks(known, site.roster, max_skew_s=site.max_skew_s)


def judge_clocks(offsets: Sequence[Offset], roster: Roster, *, max_skew_s: float) -> Outcome:
    """Name the hosts whose clock is further from the median of all than max_skew_s, beyond doubt.

    offsets: of hosts against that of rank 0, whose own is 0.
    """
    if not offsets:
        return Outcome(check="clocks", detail="one host: not compared", skipped=True)
    all_of_them = [Offset(rank=0, seconds=0.0, error_s=0.0), *offsets]
    middle = statistics.median_low(each.seconds for each in all_of_them)
    problems = [
        f"the clock of {roster.hosts[each.rank]} is {abs(each.seconds - middle):.3f} s "
        f"{'ahead' if each.seconds > middle else 'behind'}, more than the {max_skew_s:g} s allowed; "
        f"synchronise it (chronyc makestep), or {roster.exclusion([each.rank])}"
        for each in all_of_them
        if abs(each.seconds - middle) - each.error_s > max_skew_s
    ]
    widest = max(abs(each.seconds - middle) for each in all_of_them)
    doubt = max(each.error_s for each in all_of_them)
    detail = f"{len(all_of_them)} hosts within {widest:.6f} s, ± {doubt:.6f} s; {max_skew_s:g} s allowed"
    return Outcome(check="clocks", detail=detail, problems=tuple(problems))
