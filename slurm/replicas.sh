# shellcheck shell=bash
# Replicas of the student: a step of srun for each, so that a lost node ends its own replica and no other. A replica
# that has ended is started again on free nodes of the job, and joins the run. Each start has its own port, and its own
# files: LOGS/K.N is the folder of the N-th start, one of replica K. Sourced after slurm/train.sh.
# shellcheck disable=SC2030,SC2031,SC2034 # LOGS is a start's own; lib.sh uses what is set here
RUN_STEPS=run_replicas STARTS=0 LOST_NODES=""
SETTLE_SECONDS=${SETTLE_SECONDS:-15} # after a replica's end: the others have ended by then too, if the run has
RETRY_SECONDS=${RETRY_SECONDS:-300}  # between two looks for free nodes
LAST_SECONDS=${LAST_SECONDS:-120}    # for the others, after the first replica has ended as requested
# of replica K: time of its end, and of its next start; starts after the checkpoint BEFORE; time, nodes and logs of its
# last start
ENDED=() AGAIN=() TRIES=() BEFORE=() STARTED=() NODES_OF=() FOLDER_OF=()

# The store of the replicas is a process of this script, on the batch host: it outlives all replicas, but not the job.
if [ -z "${STORE_SERVER+set}" ]; then
  STORE_SERVER=("${MEGADISTILL[@]:0:${#MEGADISTILL[@]}-1}" megadistill.distributed.store_server)
fi

# require_replicas: ends this job if its nodes are no whole number of replicas. One that is requeued without a lost node
# has what is left.
require_replicas() {
  [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || return 0
  local nodes=$((SLURM_JOB_NUM_NODES - SPARES))
  if [ $((nodes % ${REPLICA_NODES:?nodes of a replica: set it in slurm/env.sh})) != 0 ] || [ "$nodes" -lt 1 ]; then
    log "$SLURM_JOB_NUM_NODES nodes without SPARES=$SPARES are no multiple of REPLICA_NODES=$REPLICA_NODES"
    exit 2
  fi
}

job_nodes() { # without those that Slurm has taken out of the job: a lost node that is up again is no longer the job's
  squeue -h -j "$SLURM_JOB_ID" -o %N 2>/dev/null | grep . || echo "$SLURM_JOB_NODELIST"
}

# replicas_on_nodes COMMAND...: as many replicas as the usable nodes are enough for, at least MIN_REPLICAS.
replicas_on_nodes() {
  local usable want=$(((SLURM_JOB_NUM_NODES - SPARES + REPLICA_NODES - 1) / REPLICA_NODES * REPLICA_NODES))
  [ "$want" -le "$SLURM_JOB_NUM_NODES" ] || want=$((want - REPLICA_NODES))
  COMMAND=("$@")
  mapfile -t usable < <(usable_nodes "$(job_nodes)" "$want")
  REPLICAS=$((${#usable[@]} / REPLICA_NODES))
  [ "$REPLICAS" -ge "${MIN_REPLICAS:-1}" ] || return 1
  [ "${#usable[@]}" -eq "$want" ] || log "nodes for $REPLICAS of $((want / REPLICA_NODES)) replicas"
  STEP_NODES=$(printf '%s\n' "${usable[@]:0:REPLICAS*REPLICA_NODES}")
}

# start_store: sets STORE_PID and MEGADISTILL_STORE. It ignores the signals of the job, after which the ranks save.
start_store() {
  (
    trap '' USR1 USR2 TERM INT
    exec "${STORE_SERVER[@]}" --port "$MASTER_PORT" >"$LOGS/store.log" 2>&1
  ) &
  STORE_PID=$!
  disown "$STORE_PID" # bash would report its end in the log
  export MEGADISTILL_STORE=$SLURMD_NODENAME:$MASTER_PORT
  for _ in {1..240}; do
    kill -0 "$STORE_PID" 2>/dev/null || break
    ! (exec 3<>"/dev/tcp/$SLURMD_NODENAME/$MASTER_PORT") 2>/dev/null || return 0
    sleep 0.5
  done
  log "the store of the replicas did not start: $(tail -n 1 "$LOGS/store.log")"
  kill -KILL "$STORE_PID" 2>/dev/null
  return 1
}

# start_replica K NODES COMMAND...: on nodes, one per line. No two starts of a job have the same port.
start_replica() {
  local folder port
  STARTS=$((STARTS + 1))
  folder=$LOGS/$1.$STARTS port=$((12000 + (MASTER_PORT - 12000 + 97 * STARTS) % 20000))
  mkdir -p "$folder"
  FOLDER_OF[$1]=$folder NODES_OF[$1]=$2 STARTED[$1]=$SECONDS
  MASTER_PORTS+=${MASTER_PORTS:+|}$port
  (
    export MEGADISTILL_REPLICA=$1 MEGADISTILL_REPLICAS=$REPLICAS MASTER_PORT=$port
    export LOGS=$folder
    STEP=()
    component "$2" "$RANKS_PER_NODE" "${@:3}"
    exec srun "${STEP[@]}"
  ) &
  STEP_PIDS[$1]=$!
}

# run_replicas: starts REPLICAS of COMMAND on STEP_NODES, and those again that end, until all have ended.
run_replicas() {
  local nodes replica ended last=""
  ENDED=() AGAIN=() TRIES=() BEFORE=() STARTED=() NODES_OF=() FOLDER_OF=() MASTER_PORTS=""
  start_store || return 1
  if is_stopping; then # a notice reaches no replica that starts after it
    kill -KILL "$STORE_PID" 2>/dev/null
    return
  fi
  mapfile -t nodes <<<"$STEP_NODES"
  for ((replica = 0; replica < REPLICAS; replica++)); do
    count_try "$replica"
    start_replica "$replica" "$(printf '%s\n' "${nodes[@]:replica*REPLICA_NODES:REPLICA_NODES}")" "${COMMAND[@]}"
  done
  while [ "${#STEP_PIDS[@]}" -gt 0 ]; do
    wait_for_a_second
    ended=""
    for replica in "${!STEP_PIDS[@]}"; do
      if ! kill -0 "${STEP_PIDS[replica]}" 2>/dev/null; then
        note_end "$replica"
        ended=$SECONDS
      fi
    done
    if [ "${#STEP_PIDS[@]}" = 0 ]; then break; fi # all start again: a replica alone has nobody to join
    if is_stopping; then
      [ ! -e "$RUN_FOLDER/DONE" ] || ended=$SECONDS
      last=${last:-$ended}
      # srun kills its ranks
      [ -z "$last" ] || [ $((SECONDS - last)) -lt "$LAST_SECONDS" ] || kill -TERM "${STEP_PIDS[@]}" 2>/dev/null
    elif can_join; then
      for replica in "${!ENDED[@]}"; do settle "$replica"; done
      for replica in "${!AGAIN[@]}"; do start_again "$replica"; done
    fi
  done
  kill -KILL "$STORE_PID" 2>/dev/null
  for replica in "${!ENDED[@]}"; do STEP_LOGS+=("${FOLDER_OF[$replica]}"); done # those that the run has not outlived
}

is_stopping() { [ -n "$NOTICE" ] || [ -e "$RUN_FOLDER/DONE" ]; }

can_join() { # whether a replica that starts again has others to join
  [ ! -e "$RUN_FOLDER/HOLD" ] && kill -0 "$STORE_PID" 2>/dev/null
}

wait_for_a_second() { # a signal ends it
  sleep 1 &
  wait $!
}

note_end() { # K
  local folder=${FOLDER_OF[$1]}
  unset "STEP_PIDS[$1]"
  ENDED[$1]=$SECONDS
  LOST_NODES+=${NODES_OF[$1]}$'\n'
  log "replica $1 ended on $(xargs <<<"${NODES_OF[$1]}") after $((SECONDS - STARTED[$1])) s;" \
    "ranks by exit code: $(exit_codes "$folder")"
  unset "NODES_OF[$1]"
  find "$folder" -name '*.err' -empty -delete
}

# settle K: once the others have gone on without replica K for a while, it is one to start again, unless its ranks say
# that a person has to act.
settle() {
  local why
  [ $((SECONDS - ENDED[$1])) -ge "$SETTLE_SECONDS" ] || return 0
  unset "ENDED[$1]"
  if why=$(first_rank_of "${FOLDER_OF[$1]}" 2 4); then
    log "the run continues without replica $1, which is not started again: rank $why"
    return
  fi
  ! why=$(first_rank_of "${FOLDER_OF[$1]}" 3 134) || why=": rank $why"
  if [[ $why = *"no replica is alive"* ]] && is_oldest "$1"; then # nor have those that have started since
    log "replica $1 has nobody to join$why"
    return
  fi
  log "the run continues without replica $1$why"
  AGAIN[$1]=$SECONDS
}

is_oldest() { # K: whether no replica runs that has started before replica K
  local other
  for other in "${!STEP_PIDS[@]}"; do [ "${STARTED[other]}" -gt "${STARTED[$1]}" ] || return 1; done
}

has_tries() { # K: whether a replica has started less than MAX_STARTS times after the newest checkpoint
  local now
  now=$(progress)
  [ "${BEFORE[$1]-}" = "$now" ] || TRIES[$1]=0
  BEFORE[$1]=$now
  [ "${TRIES[$1]:-0}" -lt "$MAX_STARTS" ]
}

count_try() { # K
  has_tries "$1"
  TRIES[$1]=$((${TRIES[$1]:-0} + 1))
}

# start_again K: on nodes of the job that have no replica, those first that have lost none.
start_again() {
  local free nodes
  [ "${AGAIN[$1]}" -le "$SECONDS" ] || return 0
  AGAIN[$1]=$((SECONDS + RETRY_SECONDS))
  free=$(free_nodes)
  if [ "$(grep -c . <<<"$free")" -lt "$REPLICA_NODES" ]; then
    log "replica $1 waits for $REPLICA_NODES free nodes"
    return
  fi
  if ! has_tries "$1"; then
    log "replica $1 waits for a checkpoint: it ended $MAX_STARTS times after ${BEFORE[$1]:-the beginning}"
    return
  fi
  usable_nodes "$(paste -sd , <<<"$free")" "$REPLICA_NODES" >"$LOGS/usable" &
  await $!
  mapfile -t nodes <"$LOGS/usable"
  if [ "${#nodes[@]}" -lt "$REPLICA_NODES" ]; then
    log "replica $1 waits for $REPLICA_NODES usable nodes"
    return
  fi
  ! is_stopping || return 0 # checks take a while
  log "replica $1 starts again on ${nodes[*]}"
  unset "AGAIN[$1]"
  count_try "$1"
  start_replica "$1" "$(printf '%s\n' "${nodes[@]}")" "${TRAIN[@]}" # without --take-over: it joins
}

free_nodes() {
  local used lost
  used=$(xargs <<<"${NODES_OF[*]}") lost=$(xargs <<<"$LOST_NODES")
  scontrol show hostnames "$(job_nodes)" | awk -v used="$used" -v lost="$lost" '
    BEGIN { split(used, names, " "); for (i in names) taken[names[i]]
      count = split(lost, names, " "); for (i = 1; i <= count; i++) losses[names[i]]++ }
    !($1 in taken) { print losses[$1] + 0, $1 }' | sort -s -n -k 1,1 | cut -d ' ' -f 2
}
