#!/bin/bash
# Written by python -m launch submit; sbatch takes it again as it is.
#SBATCH --job-name=rates
#SBATCH --array=0-1%1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/sweep/slurm/job-%A_%a.out
set -uo pipefail

cd /shared/fathom || exit 2
processes=2 # on each node
retries=3 # starts in a row that may lose a process without saving anything
python=/env/bin/python
container=()

# NCCL says why it fails, and nothing else. Its network is for the cluster, or --env, to choose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# What a rank prints is in its file at once, also when it is killed.
export PYTHONUNBUFFERED=1

case $SLURM_ARRAY_TASK_ID in
  0)
    run_dir=/shared/runs/smoke-peak=1e-3
    overrides=(recipe=smoke stages.pretrain_4k.lr.peak=1e-3 'name='"'"'smoke-peak=1e-3'"'"'')
    ;;
  1)
    run_dir=/shared/runs/smoke-peak=4e-3
    overrides=(recipe=smoke stages.pretrain_4k.lr.peak=4e-3 'name='"'"'smoke-peak=4e-3'"'"'')
    ;;
esac
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
attempt=${SLURM_RESTART_COUNT:-0}
logs=$run_dir/slurm/logs/$job
