"""What the processes of a job tell each other while they work: one small record each, in the shared store.

A record says that its process runs (a number that grows), at which step, and what it does: waits in a
collective, or computes. Whoever has to explain why a job stands still reads them; see parallel/watchdog.py.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

DONE = "done"
"""`Heartbeat.ended` of a process that left because its work was finished."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The record of one process.

    beat: grows by one every interval. operation, group: of the collective that it waits in (`waiting`), or of
    the last one it began ("" before the first). since_s: seconds in that state. ended: "" while it works,
    DONE, or the error it left with. machine, pid: which process of which machine it is.
    """

    rank: int
    beat: int
    step: int
    operation: str
    group: str
    waiting: bool
    since_s: float
    ended: str
    machine: str
    pid: int

    @property
    def doing(self) -> str:
        """Return what the process does, for people."""
        collective = f"{self.operation} over {self.group}"
        if self.waiting:
            return f"waiting in {collective} for {self.since_s:.1f} s"
        if self.operation:
            return f"computing, {self.since_s:.1f} s after {collective}"
        return "computing, before its first collective"

    @property
    def failed(self) -> bool:
        """Return whether the process left before its work was finished."""
        return self.ended not in ("", DONE)

    @property
    def gone(self) -> bool:
        """Return whether the process certainly does not exist any more; known on its own machine only."""
        if not self.machine or self.machine != this_machine():
            return False
        try:
            os.kill(self.pid, 0)  # signal 0 is not delivered, only checked
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is there, and another user's
        return False


def this_machine() -> str:
    """Return a name of what shares process numbers with this process; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot + os.readlink("/proc/self/ns/pid")  # containers of one machine number their own processes
    except OSError:
        return ""


class Board:
    """The shared store as the processes use it: a record each, and one verdict for all.

    Whoever finds a rank lost claims the right to say so, so that a job of thousands prints one message, and
    hands the message to the others as the verdict. Each call raises torch's DistError when the store is gone.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = dist.PrefixStore("watchdog", store)

    def write(self, heartbeat: Heartbeat) -> None:
        """Replace the record of a rank."""
        self._store.set(f"rank-{heartbeat.rank}", json.dumps(asdict(heartbeat)))

    def read(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Return the records of those ranks that have written one."""
        known = [rank for rank in ranks if self._store.check([f"rank-{rank}"])]  # `get` would wait for them
        values = self._store.multi_get([f"rank-{rank}" for rank in known]) if known else []
        return {rank: Heartbeat(**json.loads(value)) for rank, value in zip(known, values, strict=True)}

    def claim(self) -> bool:
        """Return whether this process, and no other, may now look for a verdict."""
        return self._store.add("claims", 1) == 1

    def release(self) -> None:
        """Let another process look, after this one has found nothing."""
        self._store.delete_key("claims")

    def publish(self, verdict: str) -> None:
        """Tell every process why the job ends."""
        self._store.set("verdict", verdict)

    def verdict(self) -> str | None:
        """Return why the job ends, None while it does not."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None


class Standstill:
    """For how long a value has not changed, counted in looks, one every interval_s seconds, not by a clock.

    So a process that was itself stopped for a while blames nobody when it wakes: it did not look.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._value: object = None
        self._looks = 0

    def look(self, value: object) -> float:
        """Return the seconds for which `value` has been the same."""
        self._looks = self._looks + 1 if value == self._value else 0
        self._value = value
        return self._looks * self._interval_s
