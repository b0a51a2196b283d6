#!/bin/bash
# Checks that a node is usable before ranks are started on it. Its last line is the reason if it is not.
# shellcheck source=slurm/env.sh.example
. "${MEGADISTILL_ENV:-slurm/env.sh}"
file=$FOLDER/.check-$SLURMD_NODENAME
if ! { echo "$SLURM_JOB_ID" >"$file" && [ "$(cat "$file")" = "$SLURM_JOB_ID" ] && rm "$file"; }; then
  echo "cannot write to $FOLDER" >&2
  exit 1
fi
if [ -z "${NODE_CHECK+set}" ]; then
  COLUMNS=200 exec "${MEGADISTILL[@]}" doctor "$RECIPE" --node --set run.folder="$RUN_FOLDER" "${OVERRIDES[@]}"
fi
"${NODE_CHECK[@]}"
