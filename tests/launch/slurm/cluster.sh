#!/usr/bin/env bash
# A Slurm cluster on one machine, for tests. `cluster.sh up DIR N NUMBER` brings up a controller and N nodes, with
# everything they write under DIR, and `cluster.sh down DIR` ends all of it; `cut DIR K` takes the power from node K,
# and `restore DIR K` gives it back. Clusters of different NUMBER stand beside each other without meeting. Needs root
# with the capabilities SYS_ADMIN and NET_ADMIN.
#
# A node is a slurmd in namespaces of its own: network (an address on a bridge), UTS (its host name) and mounts
# (its own /etc/hosts). The controller runs on the host, since SlurmctldHost must be a name that resolves to it.
# Not `ip netns exec`: it mounts a new /sys, in which slurmd does not find its cgroup.
set -euo pipefail

action=$1 dir=$2 count=${3:-2} master=$(hostname)
[ "$action" = up ] && number=${4:-0} || number=$(cat "$dir/number" 2>/dev/null || echo 0)
bridge=fathom-br$number net=10.77.$((7 + number))

start_munge() {
  mkdir -p "$dir/munge"
  chmod 755 "$dir" "$dir/munge"
  dd if=/dev/urandom of="$dir/munge/key" bs=1 count=1024 status=none
  chmod 400 "$dir/munge/key"
  munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
}

write_configuration() {
  local memory cores
  memory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
  cores=$(nproc)
  cat >"$dir/slurm.conf" <<CONF
ClusterName=fathom
SlurmctldHost=$master($net.1)
SlurmctldPort=$((36817 + 2 * number))
SlurmdPort=36818
AuthType=auth/munge
# A job that is queued again waits until its credential has expired: 120 s otherwise.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
$(for ((k = 1; k <= count; k++)); do
    echo "NodeName=node$k NodeAddr=$net.$((10 + k)) CPUs=$cores RealMemory=$((memory / 2)) State=UNKNOWN"
  done)
PartitionName=train Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=40 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
CONF
}

write_hosts() {
  echo "127.0.0.1 localhost" >"$dir/hosts"
  echo "$net.1 $master" >>"$dir/hosts"
  for ((k = 1; k <= count; k++)); do echo "$net.$((10 + k)) node$k" >>"$dir/hosts"; done
  # Names come from that file alone: a look-up that nobody answers takes c10d 5 s, many times.
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$dir/nsswitch.conf"
}

start_bridge() {
  if ip link show "$bridge" >/dev/null 2>&1; then
    echo "a cluster is up already: bash $0 down $(cat "/sys/class/net/$bridge/ifalias")" >&2
    exit 1
  fi
  echo "$number" >"$dir/number"
  ip link add "$bridge" type bridge
  ip link set "$bridge" alias "$dir"
  ip address add "$net.1/24" dev "$bridge"
  ip link set "$bridge" up
}

start_node() {
  local k=$1 name=node$1 holder
  mkdir -p "$dir/$name/spool"
  setsid unshare --net --uts --mount --propagation private sleep infinity &
  holder=$!
  disown
  echo "$holder" >"$dir/$name/holder.pid"
  until [ "$(readlink "/proc/$holder/ns/net")" != "$(readlink /proc/self/ns/net)" ] &&
    [ "$(tr '\0' ' ' <"/proc/$holder/cmdline")" = "sleep infinity " ]; do sleep 0.02; done
  ip link add "$bridge-$k" type veth peer name eth0 netns "$holder"
  ip link set "$bridge-$k" master "$bridge" up
  enter "$k" bash -c "
    hostname $name
    ip link set lo up
    ip address add $net.$((10 + k))/24 dev eth0
    ip link set eth0 up
    mount --bind '$dir/hosts' /etc/hosts
    mount --bind '$dir/nsswitch.conf' /etc/nsswitch.conf"
  SLURM_CONF=$dir/slurm.conf enter "$k" slurmd -N "$name"
}

# Run a command in the namespaces of a node.
enter() { nsenter --target "$(cat "$dir/node$1/holder.pid")" --net --uts --mount "${@:2}"; }

up() {
  mkdir -p "$dir/state"
  start_bridge
  start_munge
  write_configuration
  write_hosts
  slurmctld -f "$dir/slurm.conf"
  for ((k = 1; k <= count; k++)); do start_node "$k"; done
  for ((i = 0; i < 150; i++)); do
    [ "$(SLURM_CONF=$dir/slurm.conf sinfo -h -N -p train -o %t 2>/dev/null | grep -c '^idle$')" = "$count" ] && return
    sleep 0.2
  done
  echo "the nodes did not come up in 30 s; see $dir/slurmctld.log and $dir/node1/slurmd.log" >&2
  exit 1
}

# The processes in the namespaces of a node: slurmd, its steps, the ranks, and whatever they started. None if the
# node is gone and the number of its holder now that of a process of the host.
processes() {
  local holder space process
  holder=$(cat "$dir/node$1/holder.pid")
  space=$(readlink "/proc/$holder/ns/net") || return 0
  [ "$space" != "$(readlink /proc/self/ns/net)" ] || return 0
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/ns/net" 2>/dev/null)" = "$space" ] && echo "${process#/proc/}"
  done || true
}

# What a power cut does: the others hear nothing more, not even that connections have ended.
cut() {
  local process
  ip link set "$bridge-$1" down
  for process in $(processes "$1"); do
    [ "$process" = "$(cat "$dir/node$1/holder.pid")" ] || kill -KILL "$process" 2>/dev/null || true
  done
}

restore() {
  ip link set "$bridge-$1" up
  SLURM_CONF=$dir/slurm.conf enter "$1" slurmd -N "node$1"
}

down() {
  local file
  for file in "$dir"/node*/holder.pid; do
    [ -e "$file" ] || continue
    file=${file%/holder.pid}
    processes "${file##*/node}" | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
  done
  for file in "$dir/slurmctld.pid" "$dir/munge/pid"; do
    # the number may be another process's by now; both daemons have the folder on their command line
    [ ! -e "$file" ] || ! grep -qsF "$dir/" "/proc/$(cat "$file")/cmdline" ||
      kill -KILL "$(cat "$file")" 2>/dev/null || true
  done
  [ "$(cat "/sys/class/net/$bridge/ifalias" 2>/dev/null)" = "$dir" ] || return 0
  # one by one: a connection that waits for an answer keeps its node's end for minutes
  for file in "/sys/class/net/$bridge/brif"/*; do ip link delete "${file##*/}" 2>/dev/null || true; done
  ip link delete "$bridge"
}

case $action in
  up) up ;;
  down) down ;;
  cut | restore) "$action" "$3" ;;
  *) echo "usage: cluster.sh up DIR [N [NUMBER]] | down DIR | cut DIR K | restore DIR K" >&2 && exit 2 ;;
esac
