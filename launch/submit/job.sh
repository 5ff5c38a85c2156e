
# From here on the text is the same in every job. `sbatch` starts it on the first node (batch), which starts it
# once on every node (node). The exit codes are those of train/errors.py.

stop_file=$logs/stop
export FATHOM_STOP_FILE=$stop_file

say() { echo "$(date +%FT%T) job $job, start $((attempt + 1)): $*"; }

# On every node: one agent, which starts the node's ranks. It and they would die of a USR1 that comes before they
# have a handler; one that is ignored stays ignored until they have.
node() {
  trap '' USR1
  local cores
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
  exec "$python" -m parallel.agent --processes "$processes" --nodes "$SLURM_NNODES" --node "$SLURM_NODEID" \
    --master "$1" --logs "$logs/$attempt" --outcome "$logs/$attempt/outcome/$SLURM_NODEID" \
    -- "$python" -u -m train "${overrides[@]}"
}

# The smallest code of all nodes comes before what followed from it; none at all means that nodes were lost.
outcome() {
  [ "$1" -eq 0 ] && { echo 0; return; }
  local codes
  codes=$(cat "$logs/$attempt"/outcome/* 2>/dev/null | sort -n)
  echo "${codes%%$'\n'*}" | grep . || echo 4
}

# A file beside the signal: a rank that has no handler yet would miss the signal, and finds the file.
stop() {
  [ -z "$stopping" ] || return 0
  stopping=USR1
  say "USR1: the time is up or the nodes are wanted; the run saves, and is queued again"
  touch "$stop_file"
  scancel --signal=USR1 "$job" # without --batch: the ranks, not this shell
}

requeue() {
  say "$1; queued again"
  scontrol requeue "$job"
  exit "$2" # only the record of a job that could not be queued again
}

# How many starts in a row have lost a rank without having saved anything; a checkpoint begins a new count.
count_losses() {
  local newest losses=0 newest_before=
  newest=$(find "$run_dir/checkpoints" -name manifest.json -printf '%T@ %h\n' 2>/dev/null | sort -n | tail -n 1)
  [ -e "$logs/losses" ] && read -r losses newest_before <"$logs/losses"
  [ "$newest" = "$newest_before" ] || losses=0
  echo "$((losses + 1)) $newest" >"$logs/losses"
  echo "$((losses + 1))"
}

conclude() {
  local losses
  case $1 in
    0) say "done" && exit 0 ;;
    2 | 3) say "ended with code $1, which another start would repeat; see $logs/$attempt" && exit "$1" ;;
  esac
  [ "$stopping" = TERM ] && say "ended by TERM with code $1" && exit "$1"
  [ "$stopping" = USR1 ] && requeue "stopped with code $1" "$1"
  [ "$1" -eq 75 ] && say "saved and stopped; sbatch $logs/job.sh goes on" && exit 75
  losses=$(count_losses)
  [ "$losses" -le "$retries" ] && requeue "lost a process (code $1), $losses of $retries retries" "$1"
  say "lost a process (code $1), and nothing was saved in $losses starts; see $logs/$attempt"
  exit "$1"
}

batch() {
  local head step
  stopping=
  trap stop USR1
  trap 'stopping=TERM' TERM # from scancel, or from Slurm when it takes the nodes: it queues again by itself
  mkdir -p "$logs/$attempt"
  rm -f "$stop_file"
  cp "$0" "$logs/job.sh" # what runs now, whatever is submitted later
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  say "$run_dir on $SLURM_JOB_NODELIST, ranks print into $logs/$attempt"
  srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=120 "${container[@]}" \
    --output="$logs/$attempt/node-%n.log" \
    bash "$logs/job.sh" node "$head:$((20000 + SLURM_JOB_ID % 10000))" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a trap ends a wait early
  wait "$step"
  conclude "$(outcome $?)"
}

case ${1:-batch} in
  node) node "$2" ;;
  *) batch ;;
esac
