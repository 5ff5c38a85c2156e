"""`python -m launch local recipe=NAME key=value … --nproc N`: a job of N processes on this machine.

What torchrun does, and more: the configuration is checked before anything starts, the exit code is that of
the processes, Ctrl-C saves and a second one ends the job at once, and `--restarts` goes on from the last
checkpoint after a process was lost, but not after a mistake that another start would repeat.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from launch.options import at_least, command_parser
from parallel.errors import EXIT_LOST
from train.config_store import compose_run
from train.errors import RunError
from train.validate import check

CRASHED = 1
"""Exit code of a process that ended with a traceback: a mistake in the code, or hardware that failed."""

ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(argv: list[str]) -> None:
    """Check, start, and end with the exit code of the processes. RunError when nothing can be started."""
    parser = command_parser("local", __doc__)
    add = parser.add_argument
    add("--nproc", type=at_least(1, int), required=True, help="processes: one per GPU, or a few on CPUs")
    add("--restarts", type=at_least(0, int), default=0, help="how often to go on after a lost process (0)")
    add("--log-dir", type=Path, help="for what ranks other than 0 print (RUN_DIR/logs)")
    asked = parser.parse_intermixed_args(argv)
    config = compose_run(asked.overrides)
    check(config, world_size=asked.nproc)
    logs = asked.log_dir or Path(config.root) / config.name / "logs"
    job = LocalJob(asked.overrides, num_processes=asked.nproc, logs=logs)
    with job:
        code = job.run()
        for restart in range(1, asked.restarts + 1):
            if code not in (CRASHED, EXIT_LOST) or job.stopping:
                break
            print(f"a process was lost (code {code}); restart {restart} of {asked.restarts}", file=sys.stderr)
            code = job.run()
    sys.exit(code)


class LocalJob:
    """Context manager in which SIGINT, SIGTERM and SIGUSR1 ask the job to save and stop.

    The processes have a session of their own, so that Ctrl-C reaches this one alone. They learn of it from a
    file in `logs`, at their next step. For the same reason they would outlive a terminal that is closed, and
    a job started with nohup is meant to; any other is ended at once by its SIGHUP.
    """

    def __init__(self, overrides: list[str], *, num_processes: int, logs: Path) -> None:
        self.stopping = False
        self._at_once = False
        self._logs = logs
        self._stop_file = logs / "stop"
        self._agent: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        agent = ["-m", "parallel.agent", "--processes", str(num_processes), "--logs", str(logs), "--console"]
        self._command = [sys.executable, *agent, "--", sys.executable, "-m", "train", *overrides]
        threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
        self._environment = {
            "OMP_NUM_THREADS": str(threads),  # torchrun's own choice, 1, leaves cores idle
            **os.environ,
            "FATHOM_STOP_FILE": str(self._stop_file.resolve()),
        }

    def __enter__(self) -> "LocalJob":
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            self._stop_file.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{self._logs} cannot be used: {error}; use another --log-dir or root=") from error
        hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        self._before = {number: signal.signal(number, self._stop) for number in (*ASKS, *hung_up)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._stop_file.unlink(missing_ok=True)

    def run(self) -> int:
        """Start the processes, wait for them, and return their exit code; 128 + a signal that ended it."""
        self._agent = subprocess.Popen(self._command, env=self._environment, start_new_session=True)
        if self._at_once:  # asked for while the agent was being started
            self._end()
        code = self._agent.wait()
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._at_once |= number == signal.SIGHUP or (self.stopping and number == signal.SIGINT)
        self.stopping = True
        if self._at_once:
            self._end()
            return
        self._stop_file.touch()
        print("\nthe job saves after its step and stops; Ctrl-C again ends it at once", file=sys.stderr)

    def _end(self) -> None:
        if self._agent:
            self._agent.send_signal(signal.SIGHUP)  # passed on to the processes, which do not handle it
