"""Job scripts as `launch submit` writes them, and the command that rewrites their golden files:

python -m tests.launch.slurm.compose

Golden is what differs from job to job; the rest is launch/submit/job.sh, word for word.
"""

from pathlib import Path

from launch.submit.request import Request
from launch.submit.script import Task, job_script

FOLDER = Path(__file__).parent / "golden"
BODY = Path(__file__).resolve().parents[3] / "launch" / "submit" / "job.sh"

RUNS = Path("/shared/runs")
V3 = Task(run_dir=RUNS / "v3", overrides=["recipe=deepseek_v3", "name=v3", "root=/shared/runs"])
RATES = [
    Task(
        run_dir=RUNS / f"smoke-peak={rate}",
        overrides=["recipe=smoke", f"stages.pretrain_4k.lr.peak={rate}", f"name='smoke-peak={rate}'"],
    )
    for rate in ("1e-3", "4e-3")
]
JOBS = {
    "v3": (
        Request(
            nodes=256,
            time="2-00:00:00",
            signal_before=600,
            partition="gpu",
            account="lab",
            qos="high",
            constraint="h800",
            exclude="node[7,9]",
            env=("NCCL_IB_HCA=mlx5", "NOTE=it's two words"),
            sbatch_args=("--reservation=big",),
        ),
        [V3],
    ),
    "sweep": (
        Request(nodes=1, gpus_per_node=0, processes_per_node=2, at_once=1, shared=True, job_name="rates"),
        RATES,
    ),
    "container": (
        Request(nodes=2, container="registry#fathom:1", container_mounts=("/data:/data:ro",)),
        [V3],
    ),
}


def script(name: str) -> str:
    """Return the whole script of one of the jobs."""
    request, tasks = JOBS[name]
    home = RUNS / name / "slurm"
    return job_script(request, tasks, home=home, workdir=Path("/shared/fathom"), python="/env/bin/python")


def head(name: str) -> str:
    """Return what stands before the part that all scripts share."""
    text, body = script(name), BODY.read_text(encoding="utf-8")
    assert text.endswith(body)
    return text.removesuffix(body)


if __name__ == "__main__":
    for job in JOBS:
        (FOLDER / f"{job}.sh").write_text(head(job), encoding="utf-8")
        print(FOLDER / f"{job}.sh")
