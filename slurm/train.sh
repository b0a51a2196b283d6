# shellcheck shell=bash
# Shared parts of the training scripts: the command, the measure of progress, and the ranks of each node.
# shellcheck disable=SC2034 # the scripts use it
TRAIN=("${MEGADISTILL[@]}" train "${RECIPE:?}" --set run.folder="${RUN_FOLDER:?}" "${OVERRIDES[@]}")
# one rank per GPU; under --exclusive SLURM_GPUS_ON_NODE counts all GPUs of the node
if [ -z "${RANKS_PER_NODE:-}" ]; then
  RANKS_PER_NODE=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE_HET_GROUP_0:?give --gpus-per-node, or set RANKS_PER_NODE}}
  RANKS_PER_NODE=${RANKS_PER_NODE##*:} # of h100:8
fi

progress() { # the latest checkpoint
  find "$RUN_FOLDER/checkpoints" -maxdepth 1 -name 'step-*' ! -name '*.*' 2>/dev/null | sort | tail -n 1 | sed 's|.*/||'
}

# taking_over LAYOUT COMMAND...: LAYOUT with the command, which need not wait for the heartbeat of an attempt that was this
# job's, or that of a job which Slurm no longer runs: what is left of it on a node that was cut off has to end.
taking_over() {
  local layout=$1
  shift
  [ -z "$(attempt_job "$FOLDER")" ] || set -- "$@" --take-over
  "$layout" "$@"
}

one_kind_of_node() { # COMMAND...
  local want=$((SLURM_JOB_NUM_NODES - SPARES))
  STEP_NODES=$(usable_nodes "$SLURM_JOB_NODELIST" "$want")
  [ "$(wc -l <<<"$STEP_NODES")" -eq "$want" ] && component "$STEP_NODES" "$RANKS_PER_NODE" "$@"
}

ranks_of_group() { # one rank per GPU
  local gpus=SLURM_GPUS_PER_NODE_HET_GROUP_$1
  echo "${!gpus##*:}"
}

student_and_teacher() { # COMMAND...: the student's ranks come first
  local group list nodes count
  STEP_NODES=""
  for group in 0 1; do
    list=SLURM_JOB_NODELIST_HET_GROUP_$group count=SLURM_JOB_NUM_NODES_HET_GROUP_$group
    nodes=$(usable_nodes "${!list}" "${!count}" --het-group="$group")
    [ "$(wc -l <<<"$nodes")" -eq "${!count}" ] || return 1
    STEP+=(--het-group="$group")
    component "$nodes" "$(ranks_of_group "$group")" "$@"
    [ "$group" = 1 ] || STEP+=(:)
    STEP_NODES+="$nodes"$'\n'
  done
}
