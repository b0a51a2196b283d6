"""A rank's memory in each phase of a step, by the tensors that hold it.

Counted are the tensors that live at a time, in a later micro-step of a later step, when DeepSpeed knows the order of
modules. Fragmentation of the allocator, workspaces of the kernels, the CUDA context and NCCL's buffers come on top:
leave a margin.

Legend: as in `plan.counts.sharding`.
"""

import sys

from megadistill.config.recipe import Checkpointing
from megadistill.loss.buffers import ACCELERATOR_BLOCK_ELEMENTS
from megadistill.loss.inputs import ChunkPlan, fitting_tokens
from megadistill.plan.counts.sharding import FLOAT32, Sharding
from megadistill.precision import torch_dtype
from megadistill.student.optimizer import state_bytes
from megadistill.teacher.codec import ActivationCodec

Lines = dict[str, int]
"""Bytes, by the tensors that hold them."""

BLOCKS_OF_ONE, BLOCKS_OF_TWO = 4, 8
"""Copies of a block of logits in the loss's eager arithmetic, for the student alone and for both models."""

EAGER_BLOCK = sys.maxsize
"""Logits of a block of eager arithmetic: on an accelerator a whole chunk."""

TARGET_BLOCK = ACCELERATOR_BLOCK_ELEMENTS
TARGET_BLOCKS = 6
"""Copies of a block of the teacher's logits, in float64, while truncated targets are made."""


def student_memory(run: Sharding) -> dict[str, Lines]:
    """Bytes on the device of a student's rank: phase -> tensors -> bytes. The largest phase decides what it needs.

    teacher: a colocated stage computes, of several teachers the one that takes most; forward: the student's last layer
    computes; targets: truncated targets are made; loss: the first chunks' logits are in memory; backward: the backward
    pass of the largest layer; embedding: the backward pass of the embedding, whose gradient is as large as the
    vocabulary; step: the optimizer's step.
    """
    always = _states(run) | _heads(run) | _idle_teachers(run)
    phases = {
        "forward": always | _activations(run) | _last_norm(run) | _forward(run),
        "loss": always | _activations(run) | _last_norm(run) | _loss(run),
        "backward": always | _activations(run) | _backward(run),
        "embedding": always | _embedding(run),
        "step": always | _weights_before_update(run, offloaded=False),
    }
    if run.teacher is not None and run.roles is None:
        rounds = [_running_teacher(each) | _round(each) for each in run.live_teachers]
        phases["teacher"] = always | max(rounds, key=lambda lines: sum(lines.values()))
    if run.teacher is not None and run.recipe.loss.targets is not None:
        phases["targets"] = always | _activations(run) | _last_norm(run) | _targets(run)
    return {phase: {name: size for name, size in lines.items() if size} for phase, lines in phases.items()}


def teacher_memory(run: Sharding) -> Lines:
    """Bytes on the device of the teacher's largest rank; empty where it has no ranks of its own."""
    if run.roles is None or run.teacher is None:
        return {}
    clients = run.roles.students // run.roles.replicas
    # One in work, the next one received, and one more sent before the oldest was waited for.
    in_flight = (3 + run.teacher_section.queue * clients) * _packet(run)
    return {"teacher stage": _stage(run), **_running_teacher(run), "packets in flight": in_flight}


def host_memory(run: Sharding) -> Lines:
    """Bytes on the host of a student's rank."""
    lines = {"checkpoint being written": state_bytes(run.recipe.train.optimizer) * run.partition_size}
    offloaded = 0
    if run.zero.offload_param == "cpu":
        offloaded += run.itemsize * run.partition_size
    if run.zero.offload_optimizer == "cpu":  # the gradient twice: the accumulated one, and the optimizer's copy
        offloaded += (state_bytes(run.recipe.train.optimizer) + 2 * FLOAT32) * run.partition_size
    if offloaded:
        lines["offloaded ZeRO-3 states"] = offloaded
    lines |= _weights_before_update(run, offloaded=True)
    if run.recipe.student.activation_offload:
        lines["offloaded layer inputs"] = run.sequences * run.student_activations.saved
    return lines


def _states(run: Sharding) -> Lines:
    """ZeRO-3's states, allocated when the engine is built."""
    zero = run.zero
    weights = run.itemsize * run.partition_size
    state = state_bytes(run.recipe.train.optimizer)  # with the master weights
    trained = (FLOAT32 + state) * run.partition_size  # and the gradient
    lines = {
        "ZeRO-3 states": (weights if zero.offload_param == "none" else 0)
        + (trained if zero.offload_optimizer == "none" else 0),
        "persistent parameters": run.itemsize * run.persistent if run.shard > 1 else 0,
        "reduce bucket": run.reduce_itemsize * zero.reduce_bucket_size if zero.contiguous_gradients else 0,
    }
    if zero.zero_hpz_partition_size > 1:
        lines["second partition in the node (hpZ)"] = run.itemsize * run.reduced // zero.zero_hpz_partition_size
    return lines


def _weights_before_update(run: Sharding, *, offloaded: bool) -> Lines:
    """The copy from which the norms of an update follow, of the largest part that the optimizer steps at once."""
    if not run.recipe.train.norms_every or (run.zero.offload_optimizer != "none") != offloaded:
        return {}
    return {"weights before the update": FLOAT32 * min(run.partition_size, run.zero.sub_group_size)}


def _heads(run: Sharding) -> Lines:
    """The vocab slice of both heads, and the gradient of the student's over the accumulation window."""
    student = run.rows * run.student.width
    copied = run.group_size < run.shard or run.zero.offload_param != "none"  # else ZeRO-3's own partition is the slice
    own = run.student.tied or run.group_size < run.shard or run.zero.offload_optimizer != "none"
    return {
        "head rows": run.itemsize * student if copied else 0,
        "head gradient": FLOAT32 * student if own else 0,  # else the loss adds to ZeRO-3's own partition
    }


def _idle_teachers(run: Sharding) -> Lines:
    """A line for each of several teachers, with hidden states for all tokens: a micro-batch may be of one alone."""
    if not run.stats.others:
        return _idle_teacher(run)
    return {f"teacher {each.stats.teacher_name}": sum(_idle_teacher(each).values()) for each in run.live_teachers}


def _idle_teacher(run: Sharding) -> Lines:
    """A live teacher's tensors on a student's rank while the student computes."""
    if run.teacher is None:
        return {}
    head = {"teacher head rows": run.itemsize * run.rows * run.teacher.width}
    if run.roles is not None:
        float8 = run.teacher_section.transfer_dtype == "float8"
        codec = ActivationCodec(run.teacher.width, torch_dtype(run.recipe.train.precision), float8=float8)
        queue = run.teacher_section.queue * codec.bytes(run.sequences, run.stats.sequence_length)
        return head | {"teacher hidden states": _packet(run), "teacher queue": queue}
    return head | {
        "teacher stage": _stage(run),
        "teacher hidden states": _packet(run),
        "teacher hidden states in flight": 2 * run.stages * _packet(run) if run.stages > 1 else 0,
    }


def _running_teacher(run: Sharding) -> Lines:
    return {"working memory of a teacher layer": run.sequences * run.teacher_activations.forward}


def _round(run: Sharding) -> Lines:
    """A stage makes one packet for each rank of its group, and concatenates them."""
    return {"packets of a round": (1 + run.stages) * _packet(run)}


ACTIVATIONS: dict[Checkpointing, str] = {
    "none": "activations",
    "selective": "layer inputs, products and attention",
    "full": "checkpointed layer inputs",
}
"""Name of the tensors that are kept for the backward pass, by `student.activation_checkpointing`."""


def _activations(run: Sharding) -> Lines:
    counts = run.student_activations
    name, saved = ACTIVATIONS[run.recipe.student.activation_checkpointing], run.sequences * counts.saved
    if run.recipe.student.activation_offload:  # on the device are the inputs of a layer and of the next one to come
        saved = min(saved, 2 * run.itemsize * run.tokens * run.student.width)
    return {name: saved, "shared by all layers": run.sequences * counts.shared}


def _last_norm(run: Sharding) -> Lines:
    return {"last norm": run.sequences * run.student_activations.norm}


def _forward(run: Sharding) -> Lines:
    """The last layer computes. Prefetched layers arrive in one buffer, from which each parameter is copied."""
    return {
        "gathered layers": run.itemsize * max(run.gathered.peak_forward, run.live_at_loss),
        **_prefetched(run, run.gathered.forward),
        "working memory of a layer": run.sequences * run.student_activations.forward_working,
    }


def _prefetched(run: Sharding, most: int) -> Lines:
    return {"prefetched layers, copied": run.itemsize * min(run.prefetch, most)}


def _loss(run: Sharding) -> Lines:
    """The loss (`loss.vocab_parallel`) with its first chunks in memory."""
    n, in_flight = run.group_size * run.loss_chunks.chunk_tokens, run.loss_chunks.in_flight
    teachers = [each.live_teacher.width for each in run.live_teachers if each.heads == 2]
    widths = run.student.width + max(teachers, default=0)
    hidden = run.itemsize * run.tokens * run.student.width
    eager = run.recipe.loss.elementwise == "eager"  # auto is compiled on the devices that a plan is for
    blocks = BLOCKS_OF_TWO if run.heads == 2 else BLOCKS_OF_ONE
    dlogits = run.itemsize * n * run.unpadded_rows if run.itemsize != FLOAT32 else 0
    return {
        "gathered layers": run.itemsize * run.live_at_loss,
        "logit chunk": in_flight * run.heads * FLOAT32 * n * run.unpadded_rows + dlogits,
        "hidden states of a chunk": (
            (in_flight if run.group_size > 1 else 1) * run.itemsize * n * widths + FLOAT32 * n * run.student.width
        ),
        "arithmetic on a block of logits": eager * blocks * FLOAT32 * min(EAGER_BLOCK, n * run.unpadded_rows),
        "gradient of the hidden states": run.most_teachers * hidden,
        "hidden states of a teacher's rows": hidden if run.stats.others else 0,
    }


def _targets(run: Sharding) -> Lines:
    """Truncated targets of a live teacher (`loss.sparse`)."""
    fitting = fitting_tokens(run.recipe.loss.logit_memory_mb << 20, models=1, itemsize=FLOAT32, rows=run.unpadded_rows)
    chunk = ChunkPlan.of(run.tokens, fitting, run.group_size, in_flight=1).chunk_tokens
    logits = FLOAT32 * run.group_size * chunk * run.unpadded_rows
    return {
        "gathered layers": run.itemsize * run.live_at_loss,
        "logit chunk": logits,
        "arithmetic on a block of logits": TARGET_BLOCKS * 8 * min(TARGET_BLOCK, logits // FLOAT32),
    }


def _backward(run: Sharding) -> Lines:
    return {
        "gathered layers": run.itemsize * run.live_in_backward,
        **_prefetched(run, run.gathered.backward),
        "working memory of a layer": run.student_activations.backward.bytes(run.sequences),
        "gradients being reduced": run.reduce_itemsize * min(run.zero.reduce_bucket_size, run.reduced),
    }


def _embedding(run: Sharding) -> Lines:
    """The embedding's gradient, unpartitioned; a bucket that it does not fit into is reduced first."""
    lines = {
        "gathered layers": run.itemsize * run.gathered.at_end,
        "embedding gradient": run.itemsize * run.embedding_size,
    }
    if run.reduce_itemsize != run.itemsize:
        lines["gradients being reduced"] = run.reduce_itemsize * run.embedding_size
    return lines


def _stage(run: Sharding) -> int:
    """Bytes of the teacher's largest stage."""
    float8 = run.teacher_section.precision == "float8"
    return max(run.live_teacher.stage_bytes(run.stages, itemsize=run.itemsize, float8=float8))


def _packet(run: Sharding) -> int:
    """Bytes of a micro-batch's teacher hidden states, with its slots."""
    return run.itemsize * run.tokens * run.live_teacher.packet_width + 8 * run.sequences
