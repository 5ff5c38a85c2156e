"""`python -m launch` itself: commands by name, and an output that nobody reads to its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.errors import EXIT_CLOSED_PIPE

ROOT = Path(__file__).resolve().parents[2]


def test_an_unknown_command_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "trian"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: python -m launch trian: unknown; use one of plan, ")


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--help"], ["plan", "--published"]])
def test_a_closed_pipe_ends_a_command_quietly(argv: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "launch", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| true` does, before anything is printed
        assert process.stderr.read() == b""
        assert process.wait() == EXIT_CLOSED_PIPE
