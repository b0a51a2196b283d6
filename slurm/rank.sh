#!/bin/bash
# One rank of a step: runs its arguments as a command; standard error and exit code go to files of its own. The signals
# of the step reach this shell too: it waits for the command, which handles them.
trap : USR1 USR2 TERM INT
at=$LOGS/rank-$(printf %05d "$SLURM_PROCID")
"$@" 2>>"$at.err"
code=$?
echo "$code" >"$at.code"
exit "$code"
