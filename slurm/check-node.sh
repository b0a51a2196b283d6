#!/bin/bash
# Checks that a node is usable before ranks are started on it. Prints one line: usable NODE, or unusable NODE: REASON.
# shellcheck source=slurm/env.sh.example
. "${MEGADISTILL_ENV:-slurm/env.sh}"

# The environment on this node's disk is that of the archive: its size and its time are written beside it.
unpack_environment() {
  local stamp
  stamp=$(stat -c '%s %Y' "$LOCAL_ENVIRONMENT.tar") || return
  [ "$stamp" != "$(cat "$LOCAL_ENVIRONMENT/.stamp" 2>/dev/null)" ] || return 0
  rm -rf "$LOCAL_ENVIRONMENT" && mkdir -p "$LOCAL_ENVIRONMENT" &&
    tar -C "$LOCAL_ENVIRONMENT" -xf "$LOCAL_ENVIRONMENT.tar" && echo "$stamp" >"$LOCAL_ENVIRONMENT/.stamp"
}

check() {
  local file=$FOLDER/.check-$SLURMD_NODENAME
  if [ -n "${ENVIRONMENT_TAR:-}" ] && ! unpack_environment; then
    echo "cannot unpack $LOCAL_ENVIRONMENT.tar"
    return 1
  fi
  if ! { echo "$SLURM_JOB_ID" >"$file" && [ "$(cat "$file")" = "$SLURM_JOB_ID" ] && rm "$file"; }; then
    echo "cannot write to $FOLDER"
    return 1
  fi
  if [ -n "${NODE_CHECK+set}" ]; then
    "${NODE_CHECK[@]}"
  else
    COLUMNS=200 "${MEGADISTILL[@]}" doctor "$RECIPE" --node --set run.folder="$RUN_FOLDER" "${OVERRIDES[@]}"
  fi
}

if output=$(check 2>&1); then
  echo "usable $SLURMD_NODENAME"
else
  # the failed rows of doctor, else the last line
  reason=$(grep '✗' <<<"$output" || tail -n 1 <<<"$output")
  echo "unusable $SLURMD_NODENAME: $(paste -sd ' ' <<<"${reason:-its check failed}")"
fi
