"""Why a job stands still, read from the heartbeats of its processes: who is lost or late, in words."""

from collections.abc import Iterable, Mapping

from parallel.heartbeat import DONE, Heartbeat

SHOWN_RANKS = 8


def describe(beat: Heartbeat, *, silent_s: float = 0.0) -> str:
    """Return what is known of a process that is late, or lost: silent_s seconds without a heartbeat."""
    place = f"at step {beat.step}, {beat.doing}"
    if beat.ended == DONE:
        return f"rank {beat.rank} has left after step {beat.step}, its work done"
    if beat.failed:
        return f"rank {beat.rank} left at step {beat.step} with {beat.ended}"
    if beat.gone:
        return f"rank {beat.rank} was killed or crashed without a word (out of memory?), last seen {place}"
    if silent_s > 0:
        return (
            f"rank {beat.rank} has not been heard of for {silent_s:.1f} s (stopped, or its machine is lost), "
            f"last seen {place}"
        )
    return f"rank {beat.rank}, {place}"


def listed(descriptions: Iterable[str]) -> str:
    """Join descriptions, the first SHOWN_RANKS in full."""
    every = list(descriptions)
    more = [f"and {len(every) - SHOWN_RANKS} more"] if len(every) > SHOWN_RANKS else []
    return "; ".join(every[:SHOWN_RANKS] + more)


def left_behind(beats: Iterable[Heartbeat]) -> list[Heartbeat]:
    """Return the processes that ended before their work was finished."""
    return [beat for beat in beats if beat.gone or beat.failed]


def silent(early: Mapping[int, Heartbeat], late: Mapping[int, Heartbeat]) -> list[Heartbeat]:
    """Return the processes at work whose heart did not beat between two readings of the records."""
    return [
        beat
        for rank, beat in late.items()
        if not beat.ended and rank in early and early[rank].beat == beat.beat
    ]


def late(beats: Iterable[Heartbeat], waiting: Heartbeat) -> list[Heartbeat]:
    """Return the processes for which `waiting` probably waits, though all of them run.

    The first of these kinds that there are, and of these the ones at the lowest step: those that left; those
    that wait in no collective; those that wait in another one; whoever began to wait last.
    """
    others = [beat for beat in beats if beat.rank != waiting.rank]
    kinds = (
        [beat for beat in others if beat.ended or beat.gone],
        [beat for beat in others if not beat.waiting],
        [b for b in others if (b.operation, b.group) != (waiting.operation, waiting.group)],
        sorted(others, key=lambda beat: (beat.step, beat.since_s))[:1],
    )
    found = next((kind for kind in kinds if kind), [])
    lowest = min((beat.step for beat in found), default=0)
    return [beat for beat in found if beat.step == lowest]


def first_line(error: BaseException | None) -> str:
    """Return the type and the first line of an error, at most 200 characters."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 200 else text[:199] + "…"
