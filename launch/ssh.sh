#!/bin/bash
# A run on machines that ssh reaches without a password and that have the same paths: node.sh on each, started again
# while that helps. Run it in tmux or under nohup on any machine.
#
#   HOSTS="n1 n2 n3 n4" RUN_FOLDER=/shared/runs/mine launch/ssh.sh megadistill train recipes/mine.yaml
#
#   HOSTS              the first is MASTER_ADDR
#   RUN_FOLDER, RANKS_PER_NODE, MASTER_PORT: of node.sh
#   ENVIRONMENT        a file of the nodes that is read first: PATH, OMP_NUM_THREADS, NCCL_*
#
# Exit code: 0 done; 2 or 4 as a node's; 4 after three starts without a new checkpoint, with the reason in HOLD.
# To stop: touch RUN_FOLDER/HOLD RUN_FOLDER/STOP. A signal to this script does the same.
set -u
if [ $# = 0 ] || [ -z "${HOSTS:-}" ] || [ -z "${RUN_FOLDER:-}" ]; then
  echo "ssh.sh: HOSTS='n1 n2' RUN_FOLDER=FOLDER ssh.sh COMMAND..., as in: ssh.sh megadistill train recipes/mine.yaml" >&2
  exit 2
fi
read -ra hosts <<<"$HOSTS"
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$RUN_FOLDER" || exit 4

newest() { # the latest checkpoint
  find "$RUN_FOLDER/checkpoints" -maxdepth 1 -name 'step-*' ! -name '*.*' 2>/dev/null | sort | tail -n 1
}
hold() {
  echo "$1" >"$RUN_FOLDER/HOLD"
  echo "ssh.sh: $1" >&2
}
signalled=""
stop() {
  signalled=1
  hold "stopped by a signal to ssh.sh: delete this file to resume"
  touch "$RUN_FOLDER/STOP"
}
trap stop TERM INT

remote() { # NODE_RANK COMMAND...: one line for the shell of that node
  local rank=$1 line
  shift
  line="cd $(printf %q "$PWD")"
  [ -z "${ENVIRONMENT:-}" ] || line+=" && . $(printf %q "$ENVIRONMENT")"
  line+=" && NODES=${#hosts[@]} NODE_RANK=$rank MASTER_ADDR=$(printf %q "${hosts[0]}")"
  line+=" MASTER_PORT=${MASTER_PORT:-29500} LAUNCH_ID=$(printf %q "$launch")"
  line+=" RUN_FOLDER=$(printf %q "$RUN_FOLDER") ${RANKS_PER_NODE:+RANKS_PER_NODE=$(printf %q "$RANKS_PER_NODE")}"
  line+=" exec $(printf %q "$here/node.sh")$(printf ' %q' "$@")"
  echo "$line"
}

launch="$HOSTNAME-$$-$(date +%s)"
failures=0
while :; do
  before=$(newest)
  nodes=()
  for rank in "${!hosts[@]}"; do
    ssh -o BatchMode=yes -o ServerAliveInterval=30 "${hosts[rank]}" "$(remote "$rank" "$@")" &
    nodes+=($!)
  done
  codes=" "
  for node in "${nodes[@]}"; do
    while :; do # a signal ends `wait` before the node
      signalled=""
      wait "$node"
      code=$?
      [ -n "$signalled" ] || break
    done
    codes+="$code "
  done
  case $codes in
    *" 2 "*) exit 2 ;;
    *" 4 "*) exit 4 ;;
    *" "[!0]*) ;;
    *) exit 0 ;;
  esac
  if [ -e "$RUN_FOLDER/HOLD" ]; then
    exit 4
  elif [ "$(newest)" = "$before" ]; then
    failures=$((failures + 1))
  else
    failures=0
  fi
  if [ "$failures" -ge 3 ]; then
    hold "three starts without a new checkpoint; exit codes of the nodes:${codes% }. Delete this file to resume"
    exit 4
  fi
  echo "ssh.sh: exit codes of the nodes:${codes% }; starting again" >&2
  sleep "${PAUSE:-10}"
done
