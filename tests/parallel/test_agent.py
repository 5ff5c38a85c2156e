"""The agent of one machine, with real processes: exit codes, files, and machines that meet."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.agent import complaints, verdict

LAUNCHER = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 75], 75),
        ([2, -signal.SIGTERM], 2),
        ([4, 75, 1], 1),
        ([75, 3], 3),
        ([-signal.SIGKILL, -signal.SIGTERM, 75], 4),
        ([-signal.SIGTERM], 4),
    ],
)
def test_the_verdict_is_the_cause(codes: list[int], expected: int) -> None:
    assert verdict(codes) == expected


def test_complaints_are_the_ends_of_error_files(tmp_path: Path) -> None:
    (tmp_path / "rank-4.err").write_text("".join(f"line {i}\n" for i in range(30)), encoding="utf-8")
    (tmp_path / "rank-5.err").touch()
    (text,) = complaints(tmp_path, range(4, 8))
    assert text.splitlines() == [f"--- {tmp_path}/rank-4.err", *(f"line {i}" for i in range(10, 30))]


def agent(logs: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """Start an agent of two processes that run a shell script."""
    command = [sys.executable, "-m", "parallel.agent", "--processes", "2", "--logs", str(logs), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--", "bash", "-c", script], cwd=LAUNCHER, stdout=pipe, stderr=pipe, text=True
    )


def test_one_machine(tmp_path: Path) -> None:
    """Three agents at a time, since most of each is importing torch."""
    fails = agent(
        tmp_path / "a",
        "echo $RANK of $WORLD_SIZE; [ $RANK = 1 ] || sleep 60; echo why >&2; exit 3",
        "--outcome",
        str(tmp_path / "a" / "code"),
    )
    killed = agent(tmp_path / "b", '[ "$RANK" = 0 ] || kill -KILL $(exec sh -c "echo \\$PPID"); sleep 60')
    well = agent(tmp_path / "c", "echo $RANK", "--console")
    _, errors = fails.communicate(timeout=60)
    assert fails.returncode == 3
    assert f"--- {tmp_path}/a/rank-1.err\nwhy\n" in errors
    assert (tmp_path / "a" / "code").read_text(encoding="utf-8") == "3\n"
    assert (tmp_path / "a" / "rank-0.out").read_text(encoding="utf-8") == "0 of 2\n"
    killed.communicate(timeout=60)
    assert killed.returncode == 4
    output, _ = well.communicate(timeout=60)
    assert (well.returncode, output) == (0, "0\n")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["rank-1.err", "rank-1.out"]


def test_machines_number_their_ranks_in_order(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        master = f"localhost:{free.getsockname()[1]}"
    nodes = [
        agent(
            tmp_path,
            "echo $RANK $LOCAL_RANK $WORLD_SIZE",
            "--nodes=2",
            f"--node={node}",
            f"--master={master}",
        )
        for node in (1, 0)
    ]
    for node in nodes:
        node.communicate(timeout=60)
        assert node.returncode == 0
    said = [(tmp_path / f"rank-{rank}.out").read_text(encoding="utf-8") for rank in range(4)]
    assert said == ["0 0 4\n", "1 1 4\n", "2 0 4\n", "3 1 4\n"]


def test_a_term_is_passed_on_and_many_machines_need_a_master(tmp_path: Path) -> None:
    lonely = agent(tmp_path, "true", "--nodes=2")
    waiting = agent(tmp_path / "t", "trap 'echo asked; exit 75' TERM; echo ready; sleep 60 & wait")
    assert "needs --master" in lonely.communicate(timeout=60)[1]
    assert lonely.returncode == 2
    files = [tmp_path / "t" / f"rank-{rank}.out" for rank in (0, 1)]
    while not all(file.exists() and file.read_text(encoding="utf-8") for file in files):
        assert waiting.poll() is None
    waiting.terminate()
    waiting.communicate(timeout=60)
    assert waiting.returncode == 128 + signal.SIGTERM
    assert [file.read_text(encoding="utf-8") for file in files] == ["ready\nasked\n"] * 2


ORPHAN = """
import signal, subprocess
from parallel.agent import end_children
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
end_children()
assert child.wait(5) == -signal.SIGKILL
end_children()
"""


def test_no_process_outlives_an_agent_that_was_starting_it() -> None:
    subprocess.run([sys.executable, "-c", ORPHAN], cwd=LAUNCHER, check=True, timeout=60)
