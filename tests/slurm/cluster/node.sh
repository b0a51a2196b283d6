#!/usr/bin/env bash
# node.sh crash|start|cut|heal|forbid|allow NODE [FOLDER]: what befalls a node of the cluster in CLUSTER_DIR.
#   crash   a loss of power: the link is dead, and everything on it is gone in the same moment
#   start   it is back: link and daemon
#   cut, heal   the link alone: what runs on the node goes on
#   slow, quick   the link carries a megabit a second, so a tiny run lasts as long as a test needs
#   forbid, allow   FOLDER cannot be written from this node, as with a file system that is mounted read-only
# shellcheck source=tests/slurm/cluster/common.sh
. "$(dirname "$0")/common.sh"
act=$1 node=$2 folder=${3:-}
space=$PREFIX$node
within() { nsenter --mount --target "$(pids_of "slurmd-$node")" "$@"; }
case $act in
  crash)
    ip link set "v-$space" down
    for _ in {1..20}; do
      pids=$(ip netns pids "$space")
      [ -z "$pids" ] && break
      # Frozen first, so that none sees the others die and can still say so.
      for signal in STOP KILL; do echo "$pids" | xargs kill -$signal 2>/dev/null || true; done
    done ;;
  start)
    ip link set "v-$space" up
    [ -n "$(pids_of "slurmd-$node")" ] || start_slurmd "$node" ;;
  cut) ip link set "v-$space" down ;;
  heal) ip link set "v-$space" up ;;
  slow) tc qdisc replace dev "v-$space" root tbf rate 1mbit burst 16kb latency 1s ;;
  quick) tc qdisc del dev "v-$space" root ;;
  forbid) within mount --bind "$folder" "$folder" && within mount -o remount,bind,ro "$folder" ;;
  allow) within umount "$folder" ;;
  *)
    echo "no such act: $act" >&2
    exit 2 ;;
esac
