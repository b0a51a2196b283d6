"""What a rank's memory holds, by what holds it, in each phase of a step. Arithmetic alone.

Counted are the tensors that live at a time. An allocator that cannot use all of what it has, the kernels' own working
space, the CUDA context and NCCL's buffers come on top: leave a margin. Sums are those of a later micro-step of a later
step, when DeepSpeed knows the order of modules.

Legend: as in `plan.assignment`.
"""

from megadistill.loss.softmax import BLOCK_ELEMENTS
from megadistill.loss.sparse.targets import ACCELERATOR_BLOCK_ELEMENTS
from megadistill.plan.counts.disk_usage import STATES
from megadistill.plan.counts.sharding import FLOAT32, Sharding
from megadistill.precision import torch_dtype
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RECEIVES

Lines = dict[str, int]
"""Bytes, by what holds them."""

BLOCKS_OF_ONE, BLOCKS_OF_TWO = 4, 8
"""Copies of a block of logits that the loss's eager arithmetic holds at a time, of the student alone and of both."""

TARGET_BLOCK = ACCELERATOR_BLOCK_ELEMENTS
TARGET_BLOCKS = 6
"""Copies of a block of the teacher's logits, in float64, that making truncated targets holds at a time."""

STATISTICS = 6
"""Numbers that a slice tells of a token and model in the loss (`loss.softmax`)."""


def student_memory(run: Sharding) -> dict[str, Lines]:
    """Of a student's rank on its device: phase -> bytes by what holds them. The largest sum is what it needs.

    teacher: a colocated stage works, the student rests; forward: the student's last layer works; targets: truncated
    ones are made; loss: the first chunks' logits are there; backward: the layer that takes most goes back; embedding:
    the first one goes back, whose gradient is as large as the vocabulary; step: the optimizer moves.
    """
    always = _states(run) | _heads(run) | _teacher_at_rest(run)
    phases = {
        "forward": always | _activations(run) | _last_norm(run) | _forward(run),
        "loss": always | _activations(run) | _last_norm(run) | _loss(run),
        "backward": always | _activations(run) | _backward(run),
        "embedding": always | _embedding(run),
        "step": always | _step(run),
    }
    if run.teacher is not None and run.roles is None:
        phases["teacher"] = always | _teacher_at_work(run)
    if run.teacher is not None and run.recipe.loss.targets is not None:
        phases["targets"] = always | _activations(run) | _last_norm(run) | _targets(run)
    return {phase: {what: size for what, size in lines.items() if size} for phase, lines in phases.items()}


def teacher_memory(run: Sharding) -> Lines:
    """Of the teacher's own rank that holds most; nothing where it has none."""
    if run.roles is None or run.teacher is None:
        return {}
    clients = run.roles.students // run.roles.replicas
    assert run.recipe.teacher is not None
    requests = clients * 8 * (1 + run.sequences + run.tokens) * (2 if run.recipe.data.document_mask else 1)
    return {
        "teacher stage": _stage(run),
        "teacher layer at work": _working(run),
        "packets on their way": (RECEIVES + 2 + run.recipe.teacher.queue * clients) * _packet(run) + requests,
    }


def host_memory(run: Sharding) -> Lines:
    """Of a student's rank, on its host."""
    lines = {"checkpoint on its way to the disk": len(STATES) * FLOAT32 * run.pieces(run.ranks)}
    zero, each = run.zero, run.pieces(run.ranks)
    offloaded = 0
    if zero.offload_param == "cpu":
        offloaded += run.element * each
    if zero.offload_optimizer == "cpu":
        offloaded += (len(STATES) + 2) * FLOAT32 * each  # the gradient twice: as it is summed, and as AdamW reads it
    if offloaded:
        lines["offloaded ZeRO-3 states"] = offloaded
    return lines


def _states(run: Sharding) -> Lines:
    """What ZeRO-3 holds from the build on."""
    zero, each = run.zero, run.pieces(run.ranks)
    weights = run.element * each
    trained = (1 + len(STATES)) * FLOAT32 * each  # and the gradient; the master copy is one in float32, too
    lines = {
        "ZeRO-3 states": (weights if zero.offload_param == "none" else 0)
        + (trained if zero.offload_optimizer == "none" else 0),
        "parameters that stay gathered": run.element * run.persistent if run.ranks > 1 else 0,
        "reduce bucket": _wire_element(run) * zero.reduce_bucket_size if zero.contiguous_gradients else 0,
    }
    if zero.zero_hpz_partition_size > 1:
        lines["second partition in the node (hpZ)"] = run.element * run.reduced // zero.zero_hpz_partition_size
    return lines


def _heads(run: Sharding) -> Lines:
    """The rows of both heads on which the loss computes, and the gradient of the student's over the window."""
    student = run.rows * run.student.width
    copied = run.group_size < run.ranks or run.zero.offload_param != "none"  # else ZeRO-3's own partition is the slice
    lines = {"head rows": run.element * student if copied else 0, "head gradient": FLOAT32 * student}
    if run.teacher is not None:
        lines["teacher head rows"] = run.element * run.rows * run.teacher.width
    return lines


def _teacher_at_rest(run: Sharding) -> Lines:
    """What a live teacher holds on a student's rank while the student works."""
    if run.teacher is None:
        return {}
    if run.roles is not None:
        assert run.recipe.teacher is not None
        return {"teacher hidden states": _packet(run), "teacher's queue": run.recipe.teacher.queue * _answer(run)}
    in_flight = 2 * run.stages * _packet(run) if run.stages > 1 else 0
    return {
        "teacher stage": _stage(run),
        "teacher hidden states": _packet(run),
        "teacher hidden states in flight": in_flight,
    }


def _teacher_at_work(run: Sharding) -> Lines:
    """A stage gives one packet for each rank of its group, and copies them to one piece."""
    return {"teacher layer at work": _working(run), "packets of a round": (1 + run.stages) * _packet(run)}


def _activations(run: Sharding) -> Lines:
    counted = run.student.activations(run.recipe.train.precision, masked=run.recipe.data.document_mask)
    shared = {"what layers share": run.sequences * counted.shared}
    if run.recomputes:
        return {"checkpointed layer inputs": run.sequences * counted.inputs, **shared}
    return {"activations": run.sequences * counted.kept, **shared}


def _last_norm(run: Sharding) -> Lines:
    counted = run.student.activations(run.recipe.train.precision, masked=run.recipe.data.document_mask)
    return {"last norm": run.sequences * counted.norm}


def _forward(run: Sharding) -> Lines:
    """The last layer works. What is fetched ahead arrives in one piece, which each parameter is copied from."""
    counted = run.student.activations(run.recipe.train.precision, masked=run.recipe.data.document_mask)
    return {
        "gathered layers": run.element * max(run.gathered.peak_forward, run.live_at_loss),
        "layers fetched ahead, copied": run.element * min(run.zero.stage3_prefetch_bucket_size, run.gathered.forward),
        "layer at work": run.sequences * counted.forward if run.recomputes else 0,
    }


def _loss(run: Sharding) -> Lines:
    """`loss.passes.evaluate`, while its first chunks are there."""
    n, flying = run.group_size * run.chunk, run.in_flight
    widths = run.student.width + (run.teacher.width if run.teacher is not None and run.heads == 2 else 0)
    recompute = FLOAT32 * run.rows * run.student.width if run.accumulation > 1 else 0
    compiled = run.recipe.loss.elementwise == "compiled"
    blocks = BLOCKS_OF_TWO if run.heads == 2 else BLOCKS_OF_ONE
    slope = run.element * n * run.unpadded_rows if run.element != FLOAT32 else 0
    return {
        "gathered layers": run.element * run.live_at_loss,
        "logit chunk": flying * run.heads * FLOAT32 * n * run.unpadded_rows + slope,
        "head gradient of the micro-batch": recompute,
        "hidden states of a chunk": (
            (flying * run.element * n * widths if run.group_size > 1 else run.element * n * widths)
            + FLOAT32 * n * run.student.width
        ),
        "arithmetic on a block of logits": 0 if compiled else blocks * FLOAT32 * BLOCK_ELEMENTS,
        "gradient of the hidden states": run.element * run.tokens * run.student.width,
    }


def _targets(run: Sharding) -> Lines:
    """`loss.targets`, for a run whose teacher is live."""
    assert run.teacher is not None
    logits = min(run.recipe.loss.logit_memory_mb << 20, FLOAT32 * run.group_size * run.tokens * run.unpadded_rows)
    return {
        "gathered layers": run.element * run.live_at_loss,
        "logit chunk": logits,
        "arithmetic on a block of logits": TARGET_BLOCKS * 8 * min(TARGET_BLOCK, logits // FLOAT32),
    }


def _backward(run: Sharding) -> Lines:
    counted = run.student.activations(run.recipe.train.precision, masked=run.recipe.data.document_mask)
    working = counted.recompute if run.recomputes else counted.backward
    return {
        "gathered layers": run.element * run.live_in_backward,
        "layers fetched ahead, copied": run.element * min(run.zero.stage3_prefetch_bucket_size, run.gathered.backward),
        "layer at work": working.of(run.sequences),
        "gradients on their way": _wire_element(run) * min(run.zero.reduce_bucket_size, run.reduced),
    }


def _embedding(run: Sharding) -> Lines:
    """Its gradient is made whole; a bucket that it does not fit into is reduced first."""
    lines = {
        "gathered layers": run.element * run.gathered.at_end,
        "embedding gradient": run.element * run.embedding,
    }
    if _wire_element(run) != run.element:
        lines["gradients on their way"] = _wire_element(run) * run.embedding
    return lines


def _step(run: Sharding) -> Lines:
    """AdamW reads a copy of the gradients of a sub-group."""
    if run.zero.offload_optimizer != "none":
        return {}
    return {"gradients that AdamW reads": FLOAT32 * min(run.pieces(run.ranks), run.zero.sub_group_size)}


def _stage(run: Sharding) -> int:
    assert run.teacher is not None
    return run.element * max(run.teacher.stage_parameters(run.stages))


def _working(run: Sharding) -> int:
    assert run.teacher is not None
    counted = run.teacher.activations(run.recipe.train.precision, masked=run.recipe.data.document_mask)
    return run.sequences * counted.forward


def _packet(run: Sharding) -> int:
    assert run.teacher is not None
    return run.element * run.tokens * run.teacher.width + 8 * run.sequences


def _answer(run: Sharding) -> int:
    assert run.teacher is not None
    assert run.recipe.teacher is not None
    wire = ActivationCodec(
        run.teacher.width, torch_dtype(run.recipe.train.precision), float8=run.recipe.teacher.transfer_dtype == "float8"
    )
    return wire.bytes(run.sequences, run.student.sequence_length)


def _wire_element(run: Sharding) -> int:
    """Bytes of a gradient's number as it travels: the weights' precision, but where DeepSpeed's file says otherwise."""
    return run.zero.reduce_element_bytes or run.element
