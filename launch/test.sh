#!/usr/bin/env bash
# The test suite. Arguments are passed on to pytest; without any, everything but what is marked slow, gpu or slurm.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
# One thread a process: two pytest workers share a small machine better than they share OpenMP.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$#" -eq 0 ]; then
  set -- -m "not slow and not gpu and not slurm" -n "${PYTEST_WORKERS:-2}" --dist loadfile
fi
exec .venv/bin/python -m pytest "$@"
