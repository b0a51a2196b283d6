"""Time that a micro-step takes whatever the size of its tensors: launches of kernels, and messages between ranks.

It is a floor, reckoned from the number of layers, by which a plan tells a model whose arithmetic sets the pace from a
toy whose launches do.
"""

from megadistill.plan.counts.sharding import Sharding

FORWARD_KERNELS = {"eager": 35, "compiled": 13}
"""Kernels of a decoder layer's forward pass: norms, rotations and products by themselves, or seven products, attention
and what a compiler makes of the rest. A backward pass has twice as many."""
LAUNCH_SECONDS = 5e-6
"""Time in which a process launches a kernel."""
MESSAGES = 3
"""Collectives of ZeRO-3 for a layer: its weights in both passes, and its gradients."""
MESSAGE_SECONDS = 25e-6
"""Latency of a collective of NCCL."""


def micro_step_latency(run: Sharding) -> float:
    """Seconds that a student's rank spends at least on launches and latencies in a micro-step.

    A colocated teacher adds its stage's forward passes, one for each rank of the vocab group.
    """
    kernels = FORWARD_KERNELS[run.student_compiled.value] * (3 + run.checkpoints + run.counts_experts_first)
    messages = MESSAGES + run.counts_experts_first if run.shard > 1 else 0
    seconds = run.student.layers * (kernels * LAUNCH_SECONDS + messages * MESSAGE_SECONDS)
    for each in run.live_teachers if run.roles is None else ():  # of several, as if rows of one were rounds of one
        layers = each.stats.share * each.live_teacher.layers
        seconds += layers * FORWARD_KERNELS[each.teacher_compiled.value] * LAUNCH_SECONDS
    return seconds
