#!/bin/bash
# One rank of a step: runs its arguments as a command, with standard error and exit code in files of its own. Rank 0's
# standard error, the log of the run, is copied to the job's log. The signals of the step reach this shell too: the command
# handles them.
trap : USR1 USR2 TERM INT
at=$LOGS/rank-$(printf %05d "$SLURM_PROCID")
if [ "$SLURM_PROCID" = 0 ]; then
  (
    trap '' USR1 USR2 TERM INT
    exec tail -n +1 -F "$at.err" 2>/dev/null
  ) &
  follower=$!
fi
"$@" 2>>"$at.err"
code=$?
echo "$code" >"$at.code"
[ -z "${follower:-}" ] || { sleep 1 && kill -KILL "$follower"; } # after the last lines
exit "$code"
