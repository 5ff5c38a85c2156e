"""`python -m launch COMMAND …`: what surrounds a big job.

| command | does |
| --- | --- |
| plan | layouts of a recipe on a cluster: memory, traffic, time, GPU-hours, cost |
| dryrun | real training steps of one rank of a big job, on a laptop, without tensor memory |
| preflight | checks the machines of a job, and times a collective of every group, before step 1 |
| calibrate | measures the efficiencies that plans assume |
| local | starts a job of several processes on this machine |
| submit | writes the Slurm script of a job and submits it |

Each has its own `--help`. A command's module is imported when it is asked for, so that those that need no
torch answer at once.
"""

import sys
from collections.abc import Callable
from importlib import import_module

from train.errors import RunError, exit_cleanly

COMMANDS = ("plan", "dryrun", "preflight", "calibrate", "local", "submit")


def main() -> None:
    """Run the command that the first argument names with the arguments behind it."""
    with exit_cleanly():
        _run()


def _run() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise RunError(f"python -m launch {name}: unknown; use one of {', '.join(COMMANDS)}")
    run: Callable[[list[str]], None] = import_module(f"launch.{name}.command").main
    run(rest)


if __name__ == "__main__":
    main()
