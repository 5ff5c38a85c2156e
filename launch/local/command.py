"""`python -m launch local recipe=NAME key=value … --nproc N`: a job of N processes on this machine.

What torchrun does, and more: the configuration is checked before anything starts, the exit code is that of
the processes, Ctrl-C saves and a second one ends the job at once, and `--restarts` goes on from the last
checkpoint after a process was lost, but not after a mistake that another start would repeat.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from parallel.errors import EXIT_LOST
from train.config_store import compose_run
from train.errors import RunError
from train.validate import check

CRASHED = 1
"""Exit code of a process that ended with a traceback: a mistake in the code, or hardware that failed."""

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(argv: list[str]) -> None:
    """Check, start, and end with the exit code of the processes. RunError when nothing can be started."""
    asked = _parser().parse_intermixed_args(argv)
    for option, value, least in (("--nproc", asked.nproc, 1), ("--restarts", asked.restarts, 0)):
        if value < least:
            raise RunError(f"{option} {value} must be at least {least}")
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
    file in `logs`, at their next step.
    """

    def __init__(self, overrides: list[str], *, num_processes: int, logs: Path) -> None:
        self.stopping = False
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
        self._before = {number: signal.signal(number, self._stop) for number in HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._stop_file.unlink(missing_ok=True)

    def run(self) -> int:
        """Start the processes, wait for them, and return their exit code; 128 + a signal that ended it."""
        self._agent = subprocess.Popen(self._command, env=self._environment, start_new_session=True)
        code = self._agent.wait()
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping and number == signal.SIGINT and self._agent:
            self._agent.send_signal(signal.SIGHUP)  # passed on to the processes, which do not handle it
            return
        self.stopping = True
        self._stop_file.touch()
        print("\nthe job saves after its step and stops; Ctrl-C again ends it at once", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch local", description="Train with several processes on this machine."
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="what python -m train takes: recipe=NAME key=value …")
    add("--nproc", type=int, required=True, help="processes: one per GPU, or a few on CPUs")
    add("--restarts", type=int, default=0, help="how often to go on after a process was lost (0)")
    add("--log-dir", type=Path, help="for what ranks other than 0 print (RUN_DIR/logs)")
    return parser
