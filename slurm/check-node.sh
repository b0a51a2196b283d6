#!/bin/bash
# What a node must be able to do before ranks are started on it. Its last line says what it cannot.
. "${MEGADISTILL_ENV:-slurm/env.sh}"
file=$RUN_FOLDER/.check-$SLURMD_NODENAME
if ! { echo "$SLURM_JOB_ID" >"$file" && [ "$(cat "$file")" = "$SLURM_JOB_ID" ] && rm "$file"; }; then
  echo "cannot write to $RUN_FOLDER" >&2
  exit 1
fi
if [ "${#NODE_CHECK[@]}" -gt 0 ]; then exec "${NODE_CHECK[@]}"; fi
