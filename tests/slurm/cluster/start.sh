#!/usr/bin/env bash
# Starts a Slurm of its own with NODES nodes on this machine: n1, n2, … Each is a network namespace with an address, a
# host name and mounts of its own, and a link that can be cut. Needs root and Debian's slurmctld, slurmd, slurm-client,
# munge and iproute2. Everything lies in CLUSTER_DIR; stop.sh ends what this started and nothing else.
# shellcheck source=tests/slurm/cluster/common.sh
. "$(dirname "$0")/common.sh"
NODES=${NODES:-3}
CPUS=4 # a node: more than the machine has, as they only wait for each other
GPUS=2 # a node: character devices that nothing opens, so that scripts which ask for GPUs run as they are

if ip link show "$BRIDGE" >/dev/null 2>&1; then
  echo "the bridge $BRIDGE exists: another cluster of these tests is up; end it with stop.sh and its CLUSTER_DIR" >&2
  exit 1
fi
mkdir -p "$DIR"/{log,spool,state,munge,gpu}
chmod 755 "$DIR" "$DIR"/*
chmod 711 "$DIR/munge"
: >"$DIR/pids"
dd if=/dev/urandom of="$DIR/munge/key" bs=128 count=1 status=none
chmod 400 "$DIR/munge/key"
for ((gpu = 0; gpu < GPUS; gpu++)); do mknod "$DIR/gpu/gpu$gpu" c 1 3; done

cat >"$SLURM_CONF" <<CONF
ClusterName=megadistill
SlurmctldHost=$(hostname -s)($SUBNET.254)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
# A requeued job is held back until its credential has expired, which is two minutes if nobody says otherwise.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool/%n
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=15
MessageTimeout=10
KillWait=8
UnkillableStepTimeout=90
InactiveLimit=0
MinJobAge=3600
PropagateResourceLimitsExcept=MEMLOCK
GresTypes=gpu
$(for ((i = 1; i <= NODES; i++)); do
  echo "NodeName=n$i NodeAddr=$SUBNET.$i Port=16818 CPUs=$CPUS RealMemory=16000 Gres=gpu:$GPUS State=UNKNOWN"
done)
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
CONF
for ((i = 1; i <= NODES; i++)); do echo "NodeName=n$i Name=gpu File=$DIR/gpu/gpu[0-$((GPUS - 1))]"; done >"$DIR/gres.conf"
{
  echo "127.0.0.1 localhost"
  echo "$SUBNET.254 $(hostname -s)"
  for ((i = 1; i <= NODES; i++)); do echo "$SUBNET.$i n$i"; done
} >"$DIR/hosts"

ip link add "$BRIDGE" type bridge
ip addr add "$SUBNET.254/24" dev "$BRIDGE"
ip link set "$BRIDGE" up
for ((i = 1; i <= NODES; i++)); do
  ip netns add "${PREFIX}n$i"
  ip link add "v-${PREFIX}n$i" type veth peer name eth0 netns "${PREFIX}n$i"
  ip link set "v-${PREFIX}n$i" master "$BRIDGE" up
  ip -n "${PREFIX}n$i" addr add "$SUBNET.$i/24" dev eth0
  ip -n "${PREFIX}n$i" link set eth0 up
  ip -n "${PREFIX}n$i" link set lo up
done

setsid munged --foreground --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --pid-file="$DIR/munge/pid" \
  --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed" >>"$DIR/log/munged.out" 2>&1 </dev/null &
record munged $!
for _ in {1..50}; do
  if munge -n --socket="$DIR/munge/socket" >/dev/null 2>&1; then break; fi
  sleep 0.1
done
setsid slurmctld -D -f "$SLURM_CONF" >>"$DIR/log/slurmctld.out" 2>&1 </dev/null &
record slurmctld $!
for _ in {1..100}; do
  if scontrol ping 2>/dev/null | grep -q UP; then break; fi
  sleep 0.1
done
for ((i = 1; i <= NODES; i++)); do mkdir -p "$DIR/spool/n$i" && start_slurmd "n$i"; done
for _ in {1..150}; do
  [ "$(sinfo -h -N -p main -o %T | grep -c '^idle$')" = "$NODES" ] && exit 0
  sleep 0.2
done
tail -n 5 "$DIR"/log/* >&2
exit 1
