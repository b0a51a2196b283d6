# shellcheck shell=bash disable=SC2034
# What start, stop and node share: where the cluster lies, and which processes are its own.
#
#   CLUSTER_DIR   a folder with a short path (it holds a socket); everything of the cluster is in it
set -euo pipefail
DIR=${CLUSTER_DIR:?a folder for the cluster}
PREFIX=md-     # of network namespaces: they share one name space with everything else on the machine
BRIDGE=mdbr0
SUBNET=10.88.77
export SLURM_CONF=$DIR/slurm.conf

start_time() { awk '{sub(/.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null || true; }

# A pid alone may be somebody else's by now; with its start time it is the process that was recorded.
record() { echo "$1 $2 $(start_time "$2")" >>"$DIR/pids"; }

pids_of() { # NAME: its recorded processes that are alive
  local name pid started
  while read -r name pid started; do
    if [ "$name" = "$1" ] && [ -n "$started" ] && [ "$(start_time "$pid")" = "$started" ]; then echo "$pid"; fi
  done <"$DIR/pids"
}

start_slurmd() { # NODE: a daemon in the node's own network, with its own host name and its own mounts
  local node=$1
  # nsenter, not `ip netns exec`: that remounts /sys, and slurmd then misses /sys/fs/cgroup.
  setsid nsenter --net="/run/netns/$PREFIX$node" unshare --uts --mount --propagation private bash -c "
    hostname $node
    mount --bind $DIR/hosts /etc/hosts
    exec slurmd -D -N $node -f $SLURM_CONF" >>"$DIR/log/slurmd.$node.out" 2>&1 </dev/null &
  record "slurmd-$node" $!
}
