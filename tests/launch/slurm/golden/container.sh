#!/bin/bash
# Written by python -m launch submit; sbatch takes it again as it is.
#SBATCH --job-name=container
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/container/slurm/job-%j.out
set -uo pipefail

cd /shared/fathom || exit 2
processes=8 # on each node
retries=3 # starts in a row that may lose a process without saving anything
python=python3 # the container's
container=('--container-image=registry#fathom:1' '--container-mounts=/shared/fathom:/shared/fathom,/shared/runs:/shared/runs,/data:/data:ro' '--container-workdir=/shared/fathom')

# NCCL says why it fails, and nothing else. Its network is for the cluster, or --env, to choose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# What a rank prints is in its file at once, also when it is killed.
export PYTHONUNBUFFERED=1

run_dir=/shared/runs/v3
overrides=(recipe=deepseek_v3 name=v3 root=/shared/runs)
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
attempt=${SLURM_RESTART_COUNT:-0}
logs=$run_dir/slurm/logs/$job
