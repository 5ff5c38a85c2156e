#!/usr/bin/env bash
# Jobs on a real Slurm cluster of two nodes, all on this machine. Arguments are passed on to pytest. Needs root, to
# make the nodes; on Debian and Ubuntu it installs what is missing of Slurm.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
if [ "$(id -u)" -ne 0 ]; then
  echo "error: the nodes are namespaces, which only root can make; run sudo bash launch/test_slurm.sh" >&2
  exit 2
fi
if [ "${#missing[@]}" -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "error: ${missing[*]}: not installed, and there is no apt-get; install Slurm and munge first" >&2
    exit 2
  fi
  echo "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}" >/dev/null
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# three tests at a time, since much of each is waiting; each of the workers brings up a cluster of its own
exec .venv/bin/python -m pytest -m slurm -n 3 --durations=0 tests/launch/slurm "$@"
