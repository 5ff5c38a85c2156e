"""What a job script does with every way in which a job can end. Slurm's commands are stand-ins here.

The script and the shell are real; `srun` does what a line of shell says. The real one: tests/launch/slurm/.
"""

import os
import subprocess
from pathlib import Path

import pytest

from launch.submit.request import Request
from launch.submit.script import Task, job_script

RECORD = '#!/bin/bash\necho "${0##*/} $*" >>"$CALLS"\n'
PYTHON = """#!/bin/bash
printf '%s\\n' "$OMP_NUM_THREADS" "$(trap -p USR1)" "$@"
"""
OUTCOME = "mkdir -p $LOGS/0/outcome; echo {code} >$LOGS/0/outcome/{node}; "


class Cluster:
    """A folder with the stand-ins, a run, and its script."""

    def __init__(self, folder: Path, *, tasks: int = 1, retries: int = 3) -> None:
        self.folder = folder
        self.run_dir = folder / "runs" / "t0"
        names = [folder / "runs" / f"t{task}" for task in range(tasks)]
        self.script = folder / "job.sh"
        text = job_script(
            Request(nodes=2, gpus_per_node=0, processes_per_node=4, retries=retries),
            [Task(run_dir=name, overrides=["recipe=smoke", "a=${b} 'c'"]) for name in names],
            home=folder / "runs" / "t0" / "slurm",
            workdir=folder,
            python=str(folder / "python"),
        )
        self.script.write_text(text, encoding="utf-8")
        self._command("scancel", RECORD)
        self._command("scontrol", RECORD + '[ "$1" = show ] && printf "node1\\nnode2\\n"\ntrue\n')
        self._command("python", PYTHON)

    def _command(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def run(self, srun: str, *, array: bool = False, attempt: int = 0) -> tuple[int, str]:
        """Let the job run, and `srun` be this line of shell; return the exit code and what the job said."""
        self._command("srun", f"{RECORD}script=$PPID\n{srun}\n")
        job = "70_0" if array else "71"
        variables = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "0"} if array else {}
        done = subprocess.run(
            ["bash", self.script],
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "CALLS": str(self.folder / "calls"),
                "LOGS": str(self.run_dir / "slurm" / "logs" / job),
                "SLURM_JOB_ID": "71",
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_RESTART_COUNT": str(attempt),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20,
            check=False,
        )
        return done.returncode, done.stdout

    def calls(self, command: str) -> list[str]:
        """Return the arguments of each call of one of Slurm's commands."""
        lines = (self.folder / "calls").read_text(encoding="utf-8").splitlines()
        return [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]

    @property
    def requeued(self) -> int:
        """How often the job was queued again."""
        return sum(call.startswith("requeue") for call in self.calls("scontrol"))


def failed(*codes: int) -> str:
    """What srun does when the nodes end with these codes."""
    return "".join(OUTCOME.format(code=code, node=node) for node, code in enumerate(codes)) + "exit 1"


@pytest.mark.parametrize(
    ("srun", "code", "requeued", "said"),
    [
        ("exit 0", 0, 0, "done"),
        (failed(2), 2, 0, "another start would repeat"),
        (failed(75, 3), 3, 0, "another start would repeat"),
        (failed(4, 2), 2, 0, "another start would repeat"),
        (failed(143, 2), 2, 0, "another start would repeat"),
        (failed(75, 75), 75, 0, "saved and stopped"),
        (failed(75, 4), 4, 1, "lost a process (code 4), 1 of 3 retries"),
        (failed(4, 1), 1, 1, "lost a process (code 1), 1 of 3 retries"),
        ("exit 137", 4, 1, "lost a process (code 4), 1 of 3 retries"),
        ("kill -USR1 $script; sleep 0.2; " + failed(75, 75), 75, 1, "stopped with code 75"),
        ("kill -USR1 $script; sleep 0.2; " + failed(4), 4, 1, "stopped with code 4"),
        ("kill -USR1 $script; sleep 0.2; " + failed(2), 2, 0, "another start would repeat"),
        ("kill -USR1 $script; sleep 0.2; exit 0", 0, 0, "done"),
        ("kill -TERM $script; sleep 0.2; " + failed(75), 75, 0, "ended by TERM"),
        ("kill -TERM $script; sleep 0.2; exit 143", 4, 0, "ended by TERM"),
        ("kill -USR1 $script; sleep 0.2; kill -TERM $script; sleep 0.2; exit 143", 4, 0, "ended by TERM"),
        ("kill -TERM $script; sleep 0.2; kill -USR1 $script; sleep 0.2; exit 143", 4, 0, "ended by TERM"),
    ],
)
def test_how_a_job_ends(tmp_path: Path, srun: str, code: int, requeued: int, said: str) -> None:
    cluster = Cluster(tmp_path)
    ended, output = cluster.run(srun)
    assert (ended, cluster.requeued) == (code, requeued), output
    assert said in output
    assert "unbound variable" not in output


def test_usr1_reaches_the_ranks_by_signal_and_by_file(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    _, output = cluster.run('kill -USR1 $script; sleep 0.2; [ -e "$FATHOM_STOP_FILE" ] && exit 0; exit 9')
    assert "done" in output
    assert cluster.calls("scancel") == ["--signal=USR1 71"]
    stop_file = cluster.run_dir / "slurm" / "logs" / "71" / "stop"
    assert stop_file.exists()
    _, output = cluster.run('[ -e "$FATHOM_STOP_FILE" ] && exit 9; exit 0', attempt=1)
    assert "done" in output  # the next start does not find the file of the one before


def test_a_task_of_an_array_names_itself_and_never_the_array(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, tasks=2)
    _, output = cluster.run("kill -USR1 $script; sleep 0.2; " + failed(75), array=True)
    assert cluster.calls("scancel") == ["--signal=USR1 70_0"]
    assert "requeue 70_0" in cluster.calls("scontrol"), output


def test_retries_count_starts_that_saved_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, retries=2)
    for losses in (1, 2):
        assert f"{losses} of 2 retries" in cluster.run("exit 1")[1]
    checkpoint = cluster.run_dir / "checkpoints" / "s-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}", encoding="utf-8")
    for losses in (1, 2):
        assert f"{losses} of 2 retries" in cluster.run("exit 1")[1]
    ended, output = cluster.run("exit 1")
    assert (ended, cluster.requeued) == (4, 4)
    assert "nothing was saved in 3 starts" in output


def test_srun_starts_one_agent_on_each_node(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.run("exit 0")
    (call,) = cluster.calls("srun")
    logs = cluster.run_dir / "slurm" / "logs" / "71"
    assert call.endswith(f"--output={logs}/0/node-%n.log bash {logs}/job.sh node node1:20071")
    assert "--ntasks-per-node=1" in call
    done = subprocess.run(
        ["bash", logs / "job.sh", "node", "node1:20071"],
        env={
            "PATH": os.environ["PATH"],
            "SLURM_JOB_ID": "71",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": "1",
            "OMP_NUM_THREADS": "3",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    threads, trap, *arguments = done.stdout.splitlines()
    assert threads == "3"
    assert trap == "trap -- '' SIGUSR1"  # what is ignored here stays so in the agent and its ranks
    assert arguments == [
        *("-m", "parallel.agent", "--processes", "4", "--nodes", "2", "--node", "1"),
        *("--master", "node1:20071", "--logs", f"{logs}/0", "--outcome", f"{logs}/0/outcome/1"),
        *("--", f"{tmp_path}/python", "-u", "-m", "train", "recipe=smoke", "a=${b} 'c'"),
    ]
