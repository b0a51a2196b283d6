"""Time that a micro-step takes whatever the size of its tensors: launches of kernels, and messages between ranks.

It is a floor, reckoned from the number of layers, by which a plan tells a model whose arithmetic sets the pace from a
toy whose launches do.
"""

from megadistill.plan.counts.sharding import Sharding

FORWARD_KERNELS, BACKWARD_KERNELS = 35, 70
"""Kernels of a decoder layer, as transformers runs it without a compiler: norms, rotations and products by themselves.
"""
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
    kernels = FORWARD_KERNELS * (1 + run.recomputes + run.counts_experts_first) + BACKWARD_KERNELS
    messages = MESSAGES + run.counts_experts_first if run.ranks > 1 else 0
    seconds = run.student.layers * (kernels * LAUNCH_SECONDS + messages * MESSAGE_SECONDS)
    if run.teacher is not None and run.roles is None:
        seconds += run.teacher.layers * FORWARD_KERNELS * LAUNCH_SECONDS
    return seconds
