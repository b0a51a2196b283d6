#!/usr/bin/env bash
# Ends the cluster in CLUSTER_DIR: its jobs, what still runs in its nodes, its daemons, and the network it made.
# shellcheck source=tests/slurm/cluster/common.sh
. "$(dirname "$0")/common.sh"
set +e
[ -s "$DIR/pids" ] || exit 0
nodes=$(grep -oE '^NodeName=[^ ]+' "$SLURM_CONF" | cut -d= -f2)
timeout 5 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel --full --signal=KILL 2>/dev/null
# Whatever runs in these namespaces is the cluster's: nobody else knows them.
for node in $nodes; do ip netns pids "$PREFIX$node" 2>/dev/null | xargs -r kill -KILL 2>/dev/null; done
for name in slurmctld munged; do
  for pid in $(pids_of "$name"); do kill -TERM "$pid"; done
  for _ in {1..40}; do
    if [ -z "$(pids_of "$name")" ]; then break; fi
    sleep 0.1
  done
  for pid in $(pids_of "$name"); do kill -KILL "$pid"; done
done
for node in $nodes; do
  ip link del "v-$PREFIX$node" 2>/dev/null
  ip netns del "$PREFIX$node" 2>/dev/null
done
ip link del "$BRIDGE" 2>/dev/null
: >"$DIR/pids"
