# shellcheck shell=bash
# Shared functions of the sbatch files: node checks, signals, markers and restarts.
#
# Markers decide, not exit codes: srun's is 0 after a node lost power, and 137 for a clean stop with a slow last rank.
# The markers are DONE (finished), HOLD (a person has to investigate), and the output of `progress`. Standard error and
# exit codes of the ranks are in logs/JOB/TRY/, two files a node: NODE.err and NODE.codes, each line with its rank.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?the sbatch files run under sbatch}" || exit 2
# shellcheck source=slurm/env.sh.example
. "${MEGADISTILL_ENV:-slurm/env.sh}" ||
  { echo "no such file, or its last command failed: cp slurm/env.sh.example slurm/env.sh, and edit it" && exit 2; } >&2

MAX_STARTS=3      # without progress; then HOLD
CHECK_SECONDS=120 # time limit of the nodes' checks; a node that has not answered then is not used
SPARES=${SPARES:-0}
RUN_STEPS=run_step
STEP_LOGS=() # folders of the steps' logs, where they are not LOGS
NOTICE=""         # USR2: stop with a checkpoint and resume in another job; TERM: this job is cancelled
STEP_PIDS=()

log() { echo "[$(date '+%F %T')] job $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}: $*"; }

on_notice() {
  log "SIG$1"
  [ -z "$NOTICE" ] || return # on a second signal the ranks end without a checkpoint
  NOTICE=$1
  # TERM is not forwarded: srun would kill the ranks. Slurm sends it to them itself.
  if [ "$1" = USR2 ] && [ "${#STEP_PIDS[@]}" -gt 0 ]; then kill -USR2 "${STEP_PIDS[@]}"; fi
}
trap 'on_notice USR2' USR2
trap 'on_notice TERM' TERM

# await PID: its exit code, once it has ended; a signal to this script ends `wait`, not the process.
await() {
  local code
  while wait "$1"; code=$?; kill -0 "$1" 2>/dev/null; do :; done
  return "$code"
}

# leave CODE REASON: ends this job; the run resumes when it starts again, or in the next job of an array or a chain.
leave() {
  if scontrol show job "$SLURM_JOB_ID" | grep -q 'Requeue=1'; then
    log "$2: requeued"
    trap - USR2 TERM # requeuing ends this script with TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
  fi
  log "$2: the next job of the array or chain resumes"
  exit "$1"
}

# hold FOLDER CODE REASON
hold() {
  log "HOLD: $3"
  printf '%s\njob %s, %s\nAfter fixing the cause, delete this file and submit again.\n' \
    "$3" "$SLURM_JOB_ID" "$(date)" >"$1/HOLD"
  rm -f "$1/starts-without-progress"
  exit "$2"
}

# require_open FOLDER MARKER: ends this job if the run is finished (MARKER), or if a person has to investigate (HOLD).
require_open() {
  if [ -e "$2" ]; then
    log "$2 exists: nothing is left to do (a longer run starts without it)"
    exit 0
  fi
  if [ -e "$1/HOLD" ]; then
    log "$1/HOLD exists: $(head -n 1 "$1/HOLD")"
    exit 4
  fi
}

# count_start FOLDER: called before the start, so that one that ends this script counts too.
count_start() {
  local count=0 before="" now
  now=$(progress)
  [ -s "$1/starts-without-progress" ] && read -r count before <"$1/starts-without-progress"
  [ "$before" = "$now" ] || count=0
  [ "$count" -lt "$MAX_STARTS" ] || hold "$1" 4 "$count starts without progress after ${now:-the beginning}"
  echo "$((count + 1)) $now" >"$1/starts-without-progress"
}

# send_environment: the archive ENVIRONMENT_TAR, if any, to the disk of each node; slurm/check-node.sh unpacks it.
send_environment() {
  [ -n "${ENVIRONMENT_TAR:-}" ] || return 0
  local nodes=$SLURM_JOB_NUM_NODES
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --overlap --mem=0 --immediate=20 --kill-on-bad-exit=0 \
    mkdir -p "$(dirname "${LOCAL_ENVIRONMENT:?}")"
  sbcast --force --preserve "$ENVIRONMENT_TAR" "$LOCAL_ENVIRONMENT.tar" ||
    log "$ENVIRONMENT_TAR did not reach all nodes; those without it are not used"
}

# usable_nodes LIST WANT [SRUN OPTION]: the first WANT nodes of LIST that pass slurm/check-node.sh, in LIST's order. One
# step checks all nodes. It does not wait for the others once there are enough.
usable_nodes() {
  local answers step nodes try code node reason
  answers=$(mktemp "$LOGS/checks.XXXXXX")
  for try in 1 2 3; do # a node that cannot be reached ends the step of all: then without it
    mapfile -t nodes < <(unchecked_nodes "$1" "$answers")
    [ "${#nodes[@]}" -gt 0 ] || break
    [ "$try" = 1 ] || sleep 3 # the controller notices a lost node later than srun does
    timeout "$CHECK_SECONDS" srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
      --nodelist="$(IFS=, && echo "${nodes[*]}")" --overlap --mem=0 --immediate=20 --no-kill --kill-on-bad-exit=0 \
      --wait=0 "${@:3}" bash slurm/check-node.sh >>"$answers" 2>"$answers.srun" &
    step=$! code=0
    while [ "$(grep -c '^usable ' "$answers")" -lt "$2" ] && kill -0 "$step" 2>/dev/null; do sleep 0.2; done
    [ "$(grep -c '^usable ' "$answers")" -lt "$2" ] || break
    wait "$step" || code=$?
    sed -n 's/^srun: error: .* failed on node \([^ :]*\): \(.*\)/unusable \1: \2/p' "$answers.srun" >>"$answers"
    [ "$code" != 124 ] || break
  done
  while read -r _ node reason; do log "${node%:} is not used: $reason"; done < <(grep '^unusable ' "$answers") >&2
  if [ "$(grep -c '^usable ' "$answers")" -lt "$2" ]; then
    reason=$(tail -n 1 "$answers.srun" 2>/dev/null)
    for node in $(unchecked_nodes "$1" "$answers"); do
      log "$node is not used: no answer within $CHECK_SECONDS s${reason:+ ($reason)}" >&2
    done
  fi
  scontrol show hostnames "$1" |
    awk -v want="$2" 'answers { if ($1 == "usable") usable[$2]; next }
      $1 in usable && ++count <= want' answers=1 "$answers" answers=0 -
}

unchecked_nodes() { # LIST ANSWERS: nodes without an answer, of those that Slurm does not call down or drained
  sinfo -h -N -n "$1" -o '%N %T' | sort -u |
    awk -v file="$2" 'answers { sub(/:$/, "", $2); answered[$2]; next }
      $1 in answered { next }
      $2 ~ /^(down|drain|fail|maint)|\*$/ { print "unusable " $1 ": it is " $2 >>file; next }
      { print $1 }' answers=1 "$2" answers=0 -
}

# component NODES RANKS_PER_NODE COMMAND...: adds one rank per task on these nodes (one per line) to the step STEP.
component() {
  local nodes per=$2 count cpus
  mapfile -t nodes <<<"$1"
  count=${#nodes[@]} cpus=$((SLURM_CPUS_ON_NODE / per))
  [ "$cpus" -ge 1 ] || cpus=1
  [ -n "${MASTER_ADDR:-}" ] || export MASTER_ADDR=${nodes[0]}
  STEP+=(--nodes="$count" --ntasks=$((count * per)) --ntasks-per-node="$per" --cpus-per-task="$cpus"
    --distribution=block --nodelist="$(IFS=, && echo "${nodes[*]}")" --overlap --mem=0 --immediate=60
    --kill-on-bad-exit=1 --wait=60 --output=0
    bash slurm/rank.sh "${@:3}")
}

# run_step: starts STEP, waits for its end, and logs the exit codes.
run_step() {
  local began=$SECONDS code=0
  srun "${STEP[@]}" &
  STEP_PIDS=($!)
  await "${STEP_PIDS[0]}" || code=$?
  STEP_PIDS=()
  log "srun ended with $code after $((SECONDS - began)) s; ranks by exit code: $(exit_codes "$LOGS")"
  find "$LOGS" -name '*.err' -empty -delete
}

exit_codes() { # FOLDER
  awk '{ print $2 }' "$1"/*.codes 2>/dev/null | sort | uniq -c | awk '{printf "%s%d x %s", sep, $1, $2; sep = ", "}'
}

exit_code_of() { awk -v rank="$1" '$1 == rank { print $2 }' "$LOGS"/*.codes 2>/dev/null | tail -n 1; } # RANK

# first_rank_with CODE...: its number, and its last line; of several steps (STEP_LOGS), the first that has one.
first_rank_with() {
  local folder
  for folder in "${STEP_LOGS[@]:-$LOGS}"; do
    first_rank_of "$folder" "$@" && return
  done
  return 1
}

# first_rank_of FOLDER CODE...: of these ranks the first with a reason of its own, then one that
# lost another, then one with other lines, as of warnings: most print no reason, as the fault is another's. One pass over
# the lines and codes of all ranks.
first_rank_of() {
  local file files=() found folder=$1
  shift
  for file in "$folder"/*.err "$folder"/*.codes; do [ ! -e "$file" ] || files+=("$file"); done
  [ "${#files[@]}" -gt 0 ] || return 1
  found=$(awk -v codes=" $* " '
    FILENAME ~ /\.err$/ { rank = $1; if (!sub(/^[0-9]+: /, "") || !NF) next
      sub(/:$/, "", rank); last[rank] = $0
      if (/(^| )ERROR |^megadistill: |^Traceback /) reasons[rank]
      next }
    !index(codes, " " $2 " ") { next }
    { rank = $1 + 0; score = !(rank in last) ? 3 : last[rank] ~ /lost another rank/ ? 1 : rank in reasons ? 0 : 2 }
    !seen++ || score < best || (score == best && rank < first) { best = score; first = rank; code = $2 }
    END { if (seen) print first " exit code " code ": " last[first] }' "${files[@]}")
  [ -n "$found" ] && echo "$found"
}

# log_ends: the ends that the next start mends.
log_ends() {
  local why
  if why=$(first_rank_with 3); then log "rank $why"; fi
  if why=$(first_rank_with 134); then
    log "rank $why"
    log "exit code 134 is SIGABRT, as torch's NCCL watchdog ends a rank that has lost another one: it starts again"
  fi
}

newest_attempt() { find "$1/attempts" -name '*.json' 2>/dev/null | sort | tail -n 1; }

attempt_job() { # FOLDER: the Slurm job of the newest attempt, if it has one
  sed -n 's/.*"SLURM_JOB_ID": "\([0-9]*\)".*/\1/p' "$(newest_attempt "$1")" 2>/dev/null | head -n 1
}

# other_job FOLDER: the running job that has the newest attempt, if it is not this one.
other_job() {
  local job
  job=$(attempt_job "$1")
  [ -n "$job" ] && [ "$job" != "$SLURM_JOB_ID" ] && [ "$(squeue -h -j "$job" -o %T 2>/dev/null)" = RUNNING ] &&
    echo "$job"
}

# is_superseded FOLDER BEFORE: whether another job has started in FOLDER since the attempt BEFORE.
is_superseded() {
  local now
  now=$(newest_attempt "$1")
  [ "$now" != "$2" ] && ! {
    grep -q "\"SLURM_JOB_ID\": \"$SLURM_JOB_ID\"" "$now" &&
      grep -qE "\"MASTER_PORT\": \"(${MASTER_PORTS:-$MASTER_PORT})\"" "$now"
  }
}

# until_done FOLDER MARKER LAYOUT COMMAND...: restarts COMMAND until the file MARKER exists, or this job has to end. The
# function LAYOUT fills STEP for the command with usable nodes, which the function RUN_STEPS then runs; LAYOUT fails if
# there are too few. FOLDER holds the logs, HOLD and the count of starts.
until_done() {
  local folder=$1 marker=$2 layout=$3 before why job try=0
  shift 3
  mkdir -p "$folder"
  require_open "$folder" "$marker"
  if job=$(other_job "$folder"); then
    log "job $job is running in $folder: this job ends. To stop that one: touch $folder/STOP, or scancel $job"
    exit 1
  fi
  send_environment
  while true; do
    try=$((try + 1))
    count_start "$folder"
    export FOLDER=$folder LOGS=$folder/logs/$SLURM_JOB_ID/${SLURM_RESTART_COUNT:-0}-$try
    export MASTER_PORT=$((12000 + (SLURM_JOB_ID * 131 + ${SLURM_RESTART_COUNT:-0} * 17 + try) % 20000))
    unset MASTER_ADDR # another port and another first node for each try: the last one's ranks may still hold theirs
    mkdir -p "$LOGS"
    STEP=() STEP_LOGS=()
    "$layout" "$@" || leave 3 "too few usable nodes"
    [ -z "$NOTICE" ] || leave 0 "stop requested"
    before=$(newest_attempt "$folder")
    log "start $try on $(xargs <<<"$STEP_NODES"), after $(progress | grep . || echo nothing)"
    "$RUN_STEPS"
    [ ! -e "$marker" ] || { log "done" && exit 0; }
    if is_superseded "$folder" "$before"; then
      log "another job has started in $folder: this job ends"
      exit 1
    fi
    if why=$(first_rank_with 2 4); then hold "$folder" 4 "rank $why"; fi
    log_ends
    [ "$NOTICE" != USR2 ] || leave 0 "stopped at $(progress)"
    [ "$NOTICE" != TERM ] || exit 143
    sleep 3 # the controller notices a lost node later than the ranks do
    require_open "$folder" "$marker" # a person may have stopped the run, with HOLD
  done
}

# to_the_end COMMAND...: a command of one process, on this node, that resumes where it was stopped.
to_the_end() {
  local code
  "$@" &
  STEP_PIDS=($!)
  await "${STEP_PIDS[0]}"
  code=$?
  [ "$NOTICE" != USR2 ] || leave 0 "stopped"
  exit "$code"
}
