"""Time from a fault to the next step, by part, for a run that is started again as a whole."""

from megadistill.plan.estimate import Estimate

NODE_STORAGE, STORAGE = 2e9, 100e9
"""Bytes a second of shared storage that one node, and all of them together, read or write. Assumed."""
LOCAL_STORAGE = 2e9
"""Bytes a second of a node's own disk. Assumed."""

DETECTION, CLEANUP, LAUNCH, FIRST_STEP = 30.0, 15.0, 45.0, 30.0
"""Parts (s) of a restart that hardly depend on the models. Detection: 5 s for a killed rank, 69 s for a lost node.
Clean-up: the ranks end, and the script reads why. Launch: node checks in one step, srun, imports from a node-local
environment. First step: the teacher's check and compiled layers from their cache."""
GROUPS, GROUPS_OF_RANK = 10.0, 0.005
"""Time (s) of process groups and communicators: of a small world, and more for each rank (30 s at 4,096)."""

FAULT, CHECKPOINT = "detection and clean-up", "checkpoint"
"""Names of parts."""


def storage_rate(ranks: int, ranks_per_node: int) -> float:
    """Bytes a second of shared storage that the nodes of so many ranks read or write."""
    return min(NODE_STORAGE * -(-ranks // ranks_per_node), STORAGE)


def restart_parts(estimate: Estimate) -> dict[str, float]:
    """Seconds from a fault to the first step after it, by part.

    A teacher is read once by one rank of each stage, and sent to the others at the pace of a node's network. All ranks
    together hash a checkpoint, and the first replica of the student reads it and sends it to the others; of local saves
    each rank hashes and reads its own.
    """
    run, nodes = estimate.sharding, estimate.cluster.nodes
    parts = {
        FAULT: DETECTION + CLEANUP,
        "node checks, launch, imports": LAUNCH,
        "process groups": GROUPS + GROUPS_OF_RANK * estimate.cluster.ranks,
    }
    if run.teacher is not None and estimate.times.stages:
        of_each = [each.live_teacher.stage_bytes(run.stages, itemsize=run.itemsize) for each in run.live_teachers]
        stages = tuple(map(sum, zip(*of_each, strict=True)))
        readers = min(nodes, -(-run.stages // estimate.cluster.gpus_per_node))
        read = sum(stages) / min(NODE_STORAGE * readers, STORAGE)
        network = estimate.cluster.accelerator.network_bandwidth
        sent = max(stages) / network if nodes > readers else 0.0
        parts["teacher"] = read + sent
    parts[CHECKPOINT] = _checkpoint_seconds(estimate)
    parts["first step"] = FIRST_STEP
    return parts


def _checkpoint_seconds(estimate: Estimate) -> float:
    run, size = estimate.sharding, estimate.requirements.checkpoint_bytes
    if run.recipe.checkpoint.local is not None:
        return 2 * run.replicas * size / (LOCAL_STORAGE * estimate.cluster.nodes)
    hashed = size / storage_rate(run.ranks, run.ranks_per_node)
    read = size / storage_rate(run.shard, run.ranks_per_node)
    sent = size / run.shard / estimate.cluster.accelerator.network_bandwidth if run.replicas > 1 else 0.0
    return hashed + read + sent
