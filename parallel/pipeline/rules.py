"""Where stages lie and what each schedule asks for: integers only, for checks on a machine without torch."""

from parallel.config import Schedule

V_SCHEDULES = (Schedule.zbv, Schedule.dualpipev)
"""Their stages run down the ranks and up again: rank r holds stages r and 2 pp - 1 - r."""
INTERLEAVED = (Schedule.interleaved, Schedule.interleaved_zb)
"""Their stages run down the ranks `chunks` times: rank r holds stages r, r + pp, r + 2 pp, ..."""


def stages_per_rank(schedule: Schedule, *, chunks: int) -> int:
    """Return how many stages a rank holds; `chunks` matters to the interleaved schedules only."""
    if schedule in INTERLEAVED:
        return chunks
    return 2 if schedule in V_SCHEDULES else 1


def num_stages(schedule: Schedule, *, pp: int, chunks: int) -> int:
    """Return the number of stages into which the model is cut."""
    return pp * stages_per_rank(schedule, chunks=chunks)


def stage_to_rank(schedule: Schedule, *, pp: int, chunks: int) -> tuple[int, ...]:
    """Return the rank of each stage."""
    down = tuple(range(pp))
    if schedule in V_SCHEDULES:
        return down + down[::-1]
    return down * stages_per_rank(schedule, chunks=chunks)


def schedule_problems(schedule: Schedule, *, pp: int, chunks: int, num_microbatches: int) -> list[str]:
    """Return every rule that a step of `num_microbatches` would break, each with the nearest legal value."""
    found = []
    if pp < 1:
        found.append(f"pp={pp} must be at least 1; use 1")
    if schedule in INTERLEAVED and chunks < 2:
        found.append(
            f"chunks={chunks}: schedule={schedule} needs at least 2 stages per rank; use chunks=2, "
            "or schedule=1f1b for one stage per rank"
        )
    if pp >= 1 and not _legal(schedule, pp, num_microbatches):
        found.append(
            f"{num_microbatches} microbatches: schedule={schedule} with pp={pp} needs {_rule(schedule, pp)}; "
            f"the nearest number is {_nearest(schedule, pp, num_microbatches)}"
        )
    return found


def _legal(schedule: Schedule, pp: int, num_microbatches: int) -> bool:
    if num_microbatches < 1:
        return False
    if schedule in INTERLEAVED:  # in rounds of equal size, as many as have at least pp microbatches
        return num_microbatches % max(1, num_microbatches // pp) == 0
    return True


def _rule(schedule: Schedule, pp: int) -> str:
    if schedule in INTERLEAVED:
        return f"at least 1, and a multiple of the number of rounds, microbatches // pp = n // {pp}"
    return "at least 1"


def _nearest(schedule: Schedule, pp: int, num_microbatches: int) -> int:
    # multiples of pp are legal in every schedule, so one lies within this window
    candidates = range(1, max(num_microbatches, 0) + 2 * pp + 1)
    legal = [number for number in candidates if _legal(schedule, pp, number)]
    return min(legal, key=lambda number: abs(number - num_microbatches))
