"""`python -m launch submit`: what it refuses, what it writes, and that it needs neither torch nor Slurm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.submit.command import main
from launch.submit.request import Request, seconds
from launch.submit.runs import plan_runs
from tests.launch.slurm.compose import FOLDER, JOBS, head, script
from train.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("job", JOBS)
def test_the_script_is_golden(job: str) -> None:
    """If the change is meant: python -m tests.launch.slurm.compose, and look at the difference."""
    assert head(job) == (FOLDER / f"{job}.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("job", JOBS)
def test_the_script_is_sound(job: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script(job), encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
    lines = script(job).splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]  # sbatch stops there


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:01", 86401),
        ("UNLIMITED", float("inf")),
        ("1-2-3", None),
        ("1:2:3:4", None),
        ("soon", None),
    ],
)
def test_times_of_slurm(time: str, expected: float | None) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [
        (0, None, "--gpus-per-node 0 leaves no process"),
        (8, 0, "--processes-per-node 0 must be at least 1"),
        (-1, None, "--gpus-per-node -1 must not be negative"),
    ],
)
def test_the_option_that_leaves_no_process_is_named(gpus: int, processes: int | None, expected: str) -> None:
    (problem,) = Request(nodes=1, gpus_per_node=gpus, processes_per_node=processes).problems()
    assert problem.startswith(expected)


def test_a_sound_request_has_no_problems() -> None:
    for request, _ in JOBS.values():
        assert request.problems() == []


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    arguments = [f"root={tmp_path}", "recipe=smoke", "optimizer.beta1=1.5", "name='a b'"]
    arguments += ["--nodes", "0", "--gpus-per-node", "0", "--time", "2", "--retries", "-1", "--at-once", "0"]
    arguments += ["--partition", "a b", "--job-name", "50%", "--env", "KEY", "--container-mounts", "a:/b"]
    arguments += ["--sbatch-arg=--array=3", "--sbatch-arg=--wait-all x", "--sbatch-arg=--nodes=3"]
    with pytest.raises(RunError) as caught:
        main(arguments)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    for part in (
        "16 problems in the request; nothing was submitted",
        "--nodes 0 must be at least 1",
        "use --processes-per-node for a job on CPUs",
        "--retries -1",
        "--at-once 0 must be at least 1",
        "--at-once 0 needs --sweep",
        "--signal-before 120 leaves nothing of --time 2",
        "--partition 'a b' must be one word",
        "--job-name '50%' must be one word",
        "--env 'KEY' must be KEY=VALUE",
        "--container-mounts a:/b needs --container",
        "--container-mounts 'a:/b' must be /FROM:/TO",
        "--array=3: the job script depends on --array; use --sweep",
        "--wait-all x",
        "--nodes=3: the job script depends on --nodes; use --nodes",
        "optimizer.beta1=1.5 must lie in [0, 1)",
        "Slurm takes no folder with spaces",
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_the_layout_is_checked_for_the_processes_of_all_nodes() -> None:
    one = plan_runs(["recipe=smoke", "parallel.pp=2", "parallel.ep=2"], sweep=False, world_size=4)
    assert one.problems == []
    assert [task.run_dir for task in one.tasks] == [Path("runs/smoke").resolve()]
    many = plan_runs(["recipe=smoke", "parallel.pp=2", "parallel.ep=2"], sweep=False, world_size=5)
    assert "not 5" in "\n".join(many.problems)


def test_a_sweep_names_its_runs_by_what_differs() -> None:
    rates = "stages.pretrain_4k.lr.peak=1e-3,4e-3"
    runs = plan_runs(["recipe=smoke", "name=t", rates, "seed=range(0,2)"], sweep=True, world_size=1)
    assert runs.problems == []
    assert runs.folder.name == "t"
    assert [task.run_dir.name for task in runs.tasks] == [
        "t-peak=0.001-seed=0",
        "t-peak=0.001-seed=1",
        "t-peak=0.004-seed=0",
        "t-peak=0.004-seed=1",
    ]
    assert runs.tasks[2].overrides == [
        "recipe=smoke",
        "stages.pretrain_4k.lr.peak=0.004",
        "seed=0",
        "name='t-peak=0.004-seed=0'",
    ]


def test_a_name_that_tells_runs_apart_is_left_alone() -> None:
    runs = plan_runs(["recipe=smoke", "name=lr${seed}", "seed=3,4"], sweep=True, world_size=1)
    assert [task.run_dir.name for task in runs.tasks] == ["lr3", "lr4"]
    assert runs.tasks[0].overrides == ["recipe=smoke", "name=lr${seed}", "seed=3"]


@pytest.mark.parametrize(
    ("overrides", "sweep", "message"),
    [
        (["recipe=smoke", "seed=1,2"], False, "seed: several values make a sweep of 2 runs; add --sweep"),
        (["recipe=smoke"], True, "no key has several values"),
        (["recipe=smoke", "seed=interval(0,1)"], True, "only lists, choice"),
        (["recipe=smoke", "seed=glob(*)"], True, "only lists, choice"),
        (["recipe=smoke", "seed=[1"], False, "configuration:"),
        (["recipe=nothing"], False, "nothing"),
        (["recipe=smoke", "sed=1,2"], True, "sed"),
    ],
)
def test_what_is_no_configuration_is_refused(overrides: list[str], sweep: bool, message: str) -> None:
    with pytest.raises(RunError, match=message.replace("(", r"\(")):
        plan_runs(overrides, sweep=sweep, world_size=1)


def test_runs_that_would_share_a_folder_are_refused() -> None:
    paths = "data.validation='/a b','/a_b'"
    runs = plan_runs(["recipe=smoke", paths], sweep=True, world_size=1)
    assert any("2 runs of the sweep would share" in line for line in runs.problems)


def test_dry_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe=smoke", f"root={tmp_path}", "--nodes", "1", "--gpus-per-node", "1", "--dry"])
    assert f"run_dir={tmp_path}/smoke" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_sbatch_is_given_the_script_and_its_answer_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recipe=smoke", f"root={tmp_path}/runs", "--nodes", "1", "--gpus-per-node", "1"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="sbatch is not on this machine"):
        main(arguments)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\n[ -f "$2" ] && echo "42;cluster"\n', encoding="utf-8")
    sbatch.chmod(0o755)
    main(arguments)
    said = capsys.readouterr().out
    assert "submitted job 42\n" in said
    assert "scancel --batch --signal=USR1 42" in said
    sbatch.write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2; exit 1\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"sbatch refused .*job\.sh: sbatch: error: invalid partition"):
        main(arguments)


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys, launch.local.command\nfrom launch.submit.command import main\n"
        "main(['recipe=smoke', '--nodes', '1', '--gpus-per-node', '1', '--dry'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistake_ends_with_code_2() -> None:
    command = [sys.executable, "-m", "launch", "submit", "recipe=smoke", "seed=1,2", "--nodes", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
