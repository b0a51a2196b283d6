#!/bin/bash
# One rank of a step: runs the command it is given, with its errors and its exit code in a file of its own.
# The signals of the step reach this shell too: it waits for the command, which decides what they mean.
trap : USR1 USR2 TERM INT
at=$LOGS/rank-$(printf %05d "$SLURM_PROCID")
"$@" 2>>"$at.err"
code=$?
echo "$code" >"$at.code"
exit "$code"
