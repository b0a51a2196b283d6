#!/bin/bash
# The ranks of one node: one process of COMMAND for each GPU, with the variables of torchrun, and an exit code that says
# who has to act, which torchrun's (always 1) does not.
#
#   NODES=4 NODE_RANK=0 MASTER_ADDR=n1 RUN_FOLDER=/shared/runs/mine launch/node.sh megadistill train recipes/mine.yaml
#
#   NODES, NODE_RANK   nodes of the launch, and the number of this one (1, 0)
#   MASTER_ADDR, _PORT the first node, and a free port on it (127.0.0.1, 29500)
#   RANKS_PER_NODE     if it is not one rank per GPU; on a CPU
#   RUN_FOLDER         the recipe's run.folder: it is set to it
#   LAUNCH_ID          what stays the same when a scheduler starts the launch again. A start takes over from an earlier
#                      one with the same ID, whose node may have been lost without a word
#
# Exit code: 2 or 4 where a rank ended with it (invalid input; a fault for a person), 0 where all are done, else 3
# (start again). HOLD in the run folder: 4, at once. USR2, TERM and INT are passed on once, as the request to stop: all
# ranks of all nodes save after the step at hand.
set -u
: "${NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${LAUNCH_ID:=}"
if [ $# = 0 ] || [ -z "${RUN_FOLDER:-}" ]; then
  echo "node.sh: RUN_FOLDER=FOLDER node.sh COMMAND..., as in: node.sh megadistill train recipes/mine.yaml" >&2
  exit 2
fi
: "${RANKS_PER_NODE:=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
if ! [ "$RANKS_PER_NODE" -ge 1 ] 2>/dev/null; then
  echo "node.sh: nvidia-smi lists no GPU: set RANKS_PER_NODE to the number of ranks on this node" >&2
  exit 2
fi
if [ -e "$RUN_FOLDER/HOLD" ]; then
  echo "node.sh: $RUN_FOLDER/HOLD is there: delete it to resume. $(head -c 500 "$RUN_FOLDER/HOLD")" >&2
  exit 4
fi

set -- "$@" --set run.folder="$RUN_FOLDER"
if [ -n "$LAUNCH_ID" ]; then
  mkdir -p "$RUN_FOLDER"
  if [ "$(cat "$RUN_FOLDER/launch-id" 2>/dev/null)" = "$LAUNCH_ID" ]; then
    set -- "$@" --take-over
  elif [ "$NODE_RANK" = 0 ]; then
    echo "$LAUNCH_ID" >"$RUN_FOLDER/launch-id"
  fi
fi

ranks=()
signalled=""
stop() { # a second signal would make the ranks leave without a checkpoint
  trap 'signalled=1' USR2 TERM INT
  signalled=1
  kill -USR2 "${ranks[@]}" 2>/dev/null
}
trap stop USR2 TERM INT

export MASTER_ADDR MASTER_PORT WORLD_SIZE=$((NODES * RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$RANKS_PER_NODE
for ((local = 0; local < RANKS_PER_NODE; local++)); do
  RANK=$((NODE_RANK * RANKS_PER_NODE + local)) LOCAL_RANK=$local "$@" &
  ranks+=($!)
done

codes=" "
for rank in "${ranks[@]}"; do
  while :; do # a signal ends `wait` before the rank
    signalled=""
    wait "$rank"
    code=$?
    [ -n "$signalled" ] || break
  done
  codes+="$code "
done
case $codes in
  *" 2 "*) code=2 ;;
  *" 4 "*) code=4 ;;
  *" "[!0]*) code=3 ;;
  *) code=0 ;;
esac
# what was refused did not start, and must not take over from the run that it was refused for
[ "$code" != 2 ] || [ "$NODE_RANK" != 0 ] || [ -z "$LAUNCH_ID" ] || rm -f "$RUN_FOLDER/launch-id"
[ "$code" = 0 ] || echo "node.sh: node $NODE_RANK: exit codes of the ranks:${codes% }; ending with $code" >&2
exit "$code"
