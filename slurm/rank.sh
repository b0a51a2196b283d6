#!/bin/bash
# One rank of a step: runs its arguments as a command. Standard error and exit code go to files of the node, each line
# after the rank's number. The signals of the step reach this shell and `sed` too: they wait for the command, which
# handles them.
trap : USR1 USR2 TERM INT
at=$LOGS/$SLURMD_NODENAME
exec 3> >(trap '' USR1 USR2 TERM INT && exec sed -u "s/^/$SLURM_PROCID: /" >>"$at.err")
labels=$!
"$@" 2>&3 3>&-
code=$?
exec 3>&-
for _ in {1..50}; do # its last lines; a process that the command has left may hold the pipe open
  kill -0 "$labels" 2>/dev/null || break
  sleep 0.1
done
[ -z "$(tail -c 1 "$at.err")" ] || echo >>"$at.err" # a last line without an end, which the next rank's would continue
echo "$SLURM_PROCID $code" >>"$at.codes"
exit "$code"
