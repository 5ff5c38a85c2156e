"""A job for tests of the watchdog: all-reduces until somebody ends it, or until one rank misbehaves.

    torchrun … -m tests.parallel.watched_job BEHAVIOUR RANK

BEHAVIOUR, of rank RANK at step 5: `run` on, `sleep` for ever, raise a RuntimeError as a `bug`, `skip` the
collective and enter another one; or `finish` all ranks. Each rank prints its process id at step 5.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

from parallel.groups import Group, Trace
from parallel.process import join
from parallel.watchdog import Watchdog
from train.errors import exit_cleanly
from train.signals import StopRequest

TIMEOUT_S, INTERVAL_S = 2, 0.25


def main(behaviour: str, culprit: int) -> None:
    with join(os.environ, device=torch.device("cpu"), timeout_s=30) as processes, exit_cleanly(processes):
        trace, ranks = Trace(), range(processes.world_size)
        groups = [
            Group(name, ranks, rank=processes.rank, handle=dist.new_group(), trace=trace) for name in "ab"
        ]
        watchdog = Watchdog(processes, trace=trace, timeout_s=TIMEOUT_S, interval_s=INTERVAL_S)
        watchdog.groups = {group.name: group.ranks for group in groups}
        with watchdog, watchdog.guard(), StopRequest():
            while watchdog.step < 10 or behaviour != "finish":
                time.sleep(0.01)
                watchdog.step += 1
                if watchdog.step == 5:
                    os.write(1, f"{processes.rank} {os.getpid()} is at step 5\n".encode())
                    if processes.rank == culprit:
                        misbehave(behaviour, groups[1])
                groups[0].all_reduce(torch.ones(4))


def misbehave(behaviour: str, other: Group) -> None:
    match behaviour:
        case "sleep":
            time.sleep(600)
        case "bug":
            torch.ones(2) @ torch.ones(3)
        case "skip":
            other.all_reduce(torch.ones(4))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
