"""Starts and watches the processes of one machine of a job: torchrun's own agent, with two things added.

torchrun ends with 1 whatever became of the processes, and names their logs at random. A launcher that has to
decide whether to start a job again needs to know what happened, and a person which file to open. So

    python -m parallel.agent --processes 8 --nodes 2 --node 0 --master node1:29500 --logs DIR -- COMMAND …

ends with the processes' exit code (see `verdict`) and gives each the files DIR/rank-N.out and DIR/rank-N.err.
The processes of node k are ranks k × processes and up, so ranks lie in the order in which nodes are given.
The agent never starts them again: that is for the launcher, who knows whether a code is worth it.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from parallel.errors import EXIT_LOST

MEETING_S = 900
"""How long the agents wait for each other, and those who have ended well for those who have not."""

TAIL_LINES = 20
"""How much of a file of errors is shown at the end."""


class RankFiles(LogsSpecs):
    """Two files per rank, in one folder of the whole job; with `console`, rank 0 keeps the terminal."""

    def __init__(self, folder: Path, *, console: bool) -> None:
        super().__init__(log_dir=str(folder))
        self.folder = folder
        self.console = console

    @property
    def root_log_dir(self) -> str:
        """Return the folder."""
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return where each local rank writes, given the environment it is about to get."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ranks = {local_rank: int(variables["RANK"]) for local_rank, variables in envs.items()}
        return LogsDest(
            stdouts={local_rank: self._path(rank, "out") for local_rank, rank in ranks.items()},
            stderrs={local_rank: self._path(rank, "err") for local_rank, rank in ranks.items()},
            error_files=dict.fromkeys(ranks, ""),
        )

    def _path(self, rank: int, stream: str) -> str:
        """Return a file's path; to torch, an empty one means the agent's own stream."""
        return "" if self.console and rank == 0 else str(self.folder / f"rank-{rank}.{stream}")


def verdict(codes: Iterable[int]) -> int:
    """Return the one exit code of processes of which some failed.

    codes: exit codes other than 0, or minus the signal that ended a process. Those ended by SIGTERM do not
    count, since the agent does that to the rest as soon as one has failed. A process ended by another signal
    is lost. Of what remains the smallest: the codes of train/errors.py are so ordered that causes come
    before what follows from them (1, a crash, before 4, a peer that is missed, before 75, saved and stopped).
    """
    return min((EXIT_LOST if code < 0 else code for code in codes if code != -SIGTERM), default=EXIT_LOST)


def launch(command: Sequence[str], *, config: LaunchConfig) -> int:
    """Run `command` in the processes that `config` describes, and return the code to end with.

    SIGTERM, SIGINT, SIGHUP and SIGQUIT are passed on to them; then the code is 128 + the signal.
    """
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as failed:
        return verdict(failure.exitcode for failure in failed.failures.values())
    except SignalException as stopped:
        end_children()
        return 128 + stopped.sigval
    return 0


def end_children() -> None:
    """Kill the processes that torch has not taken note of: those it was starting when a signal came."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for child in children.read_text(encoding="ascii").split() if children.exists() else []:
        with suppress(ProcessLookupError):
            os.killpg(int(child), SIGKILL)  # each leads a session of its own


def complaints(folder: Path, ranks: Iterable[int]) -> Iterable[str]:
    """Yield the end of what each of `ranks` wrote to its error file, with the path in front."""
    for rank in ranks:
        path = folder / f"rank-{rank}.err"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        if lines:
            yield "\n".join([f"--- {path}", *lines[-TAIL_LINES:]])


def main() -> None:
    """Start the processes of this machine, wait for them, and end with their exit code."""
    parser = _parser()
    asked = parser.parse_args()
    if asked.nodes > 1 and not asked.master:
        parser.error(f"--nodes {asked.nodes} needs --master HOST:PORT, the same on all of them")
    config = LaunchConfig(
        min_nodes=asked.nodes,
        max_nodes=asked.nodes,
        nproc_per_node=asked.processes,
        logs_specs=RankFiles(asked.logs, console=asked.console),
        run_id="fathom",
        # on one machine a free port can be found; on many all have to know it before
        rdzv_backend="static" if asked.master else "c10d",
        rdzv_endpoint=asked.master or "localhost:0",
        rdzv_configs={"timeout": MEETING_S, "rank": asked.node},
        local_addr=None if asked.master else "localhost",
        max_restarts=0,
    )
    code = launch(asked.command, config=config)
    if code:
        first = asked.node * asked.processes
        for text in complaints(asked.logs, range(first, first + asked.processes)):
            print(text, file=sys.stderr)
        if asked.outcome:
            asked.outcome.parent.mkdir(parents=True, exist_ok=True)
            asked.outcome.write_text(f"{code}\n", encoding="utf-8")
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parallel.agent", description="One machine of a job.")
    parser.add_argument("--processes", type=int, required=True, help="on this machine, as on every other")
    parser.add_argument("--nodes", type=int, default=1, help="machines of the job")
    parser.add_argument("--node", type=int, default=0, help="which of them this is")
    parser.add_argument("--master", metavar="HOST:PORT", help="on node 0; needed if there are others")
    parser.add_argument("--logs", type=Path, required=True, help="folder for what the processes print")
    parser.add_argument("--console", action="store_true", help="leave rank 0 the terminal")
    parser.add_argument("--outcome", type=Path, help="file for the exit code, written unless it is 0")
    parser.add_argument("command", nargs="+", help="after --; what every process runs")
    return parser


if __name__ == "__main__":
    main()
