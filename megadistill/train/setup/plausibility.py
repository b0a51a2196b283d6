"""Settings that would run and are probably a mistake: doctor has a row for each, and a run logs them when it starts."""

from pathlib import Path

import torch

from megadistill.config.auto import BY_THE_RECIPE
from megadistill.config.recipe import default_warmup, default_warmup_tokens
from megadistill.data import missing_bos
from megadistill.data.stream.segments import slots_after
from megadistill.student.deepspeed_config import low_precision_reduction
from megadistill.train.setup.held_out import training_shards_in, unmasked_splits
from megadistill.train.setup.setup import Setup
from megadistill.train.setup.teacher_files import key_of_any_teacher
from megadistill.units import listed, number_of, short

USEFUL_EPOCHS = 4
"""Epochs after which a repeated token is worth less than a new one (Muennighoff et al., 2305.16264)."""
INITIALIZER_RANGE = 0.02
"""Standard deviation of the initial weights where a model's config has none."""

EAGER_COSTS = {
    **dict.fromkeys(
        ("student.attention", "teacher.attention"), "attention writes scores [S, S] of every head to memory"
    ),
    **dict.fromkeys(("student.compile", "teacher.compile"), "each operation between a layer's products is a kernel"),
    "loss.elementwise": (
        "the loss reads and writes its logits about seven times as often as compiled, with temporaries several times "
        "as large"
    ),
}
"""Cost of an eager value of a recipe's key on an accelerator."""


def implausible_settings(setup: Setup) -> dict[str, str]:
    """Name of a check -> what is implausible, with the way out. The same on every rank."""
    warnings = {
        "warm-up": _missing_warmup(setup),
        "learning rate": _high_learning_rate(setup),
        "epochs": _many_epochs(setup),
        "BOS": _missing_bos(setup),
        "documents": _unmasked_documents(setup),
        "held-out documents": "; ".join(unmasked_splits(setup.held_out, setup.recipe)) or None,
        "held-out shards": "; ".join(training_shards_in(setup.held_out, setup.data)) or None,
        "gradient reduction": _low_precision_reduction(setup),
        "surplus rows": _surplus_rows(setup),
        "eager kernels": _eager_on_accelerator(setup),
    }
    return {check: warning for check, warning in warnings.items() if warning is not None}


def _missing_warmup(setup: Setup) -> str | None:
    section, usual = setup.recipe.train, default_warmup(setup.recipe.train.steps)
    if section.tokens is not None:
        usual = default_warmup_tokens(section.tokens)
    begins_with_weights = setup.recipe.student.weights is not None or setup.parent is not None
    if section.schedule.warmup or begins_with_weights or not usual:
        return None
    return (
        f"train.schedule.warmup_{section.unit} is 0, and the student begins with random weights, which the first steps "
        "at the full learning rate may spoil for good: leave the key out, or set "
        f"train.schedule.warmup_{section.unit}={usual}"
    )


def _high_learning_rate(setup: Setup) -> str | None:
    rate = setup.recipe.train.optimizer.learning_rate
    deviation = getattr(setup.student_config, "initializer_range", INITIALIZER_RANGE)
    if rate <= deviation:
        return None
    return (
        f"train.optimizer.learning_rate is {rate:g}, and a step changes a weight by about that much, more "
        f"than the standard deviation {deviation:g} of the initial weights: 3e-4 (1B parameters) to 3e-3 (small "
        "models) are usual"
    )


def _missing_bos(setup: Setup) -> str | None:
    """For a teacher, or weights, that may have been trained with BOS; random weights learn either way."""
    for name, each in setup.teachers.items():
        if (warning := _missing_bos(each)) is not None:
            return f"teachers.{name}: {warning}"
    teacher, weights = setup.recipe.teacher, setup.recipe.student.weights
    if teacher is None and weights is None:
        return None
    folder = weights if teacher is None else teacher.path if teacher.vocab_map is None else None
    return missing_bos(None if folder is None else Path(folder), setup.data, key="data.insert_bos=true")


def _low_precision_reduction(setup: Setup) -> str | None:
    return low_precision_reduction(setup.deepspeed_config, setup.recipe.train.precision, setup.ranks)


def _surplus_rows(setup: Setup) -> str | None:
    """Compute that is lost where a global batch does not divide over the ranks."""
    ranks, sequence = number_of(setup.data_world, "rank"), setup.recipe.distributed.sequence
    if sequence > 1:
        ranks = number_of(setup.data_world, "group") + f" of {sequence} ranks"
    parts = []
    for shape in setup.shapes:
        if (share := shape.surplus(setup.data_world)) > 0:
            divisor = setup.data_world * shape.micro_batch
            below = shape.global_batch // divisor * divisor
            fits = " or ".join(f"{value:,}" for value in (below, below + divisor) if value > 0)
            of_entry = f" of curriculum entry {shape.entry}" if len(setup.shapes) > 1 else ""
            parts.append(
                f"the global batch of {shape.global_batch:,} sequences{of_entry} does not divide into {ranks} x "
                f"micro-batch {shape.micro_batch:,}, and {share:.1%} of the rows that are computed are surplus, which "
                f"count for nothing; the nearest global batches without any: {fits}"
            )
    return "; ".join(parts) or None


def _eager_on_accelerator(setup: Setup) -> str | None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return None
    eager: dict[str, list[str]] = {}
    for key, choice in setup.choices().items():
        if choice.value == "eager":
            eager.setdefault(choice.reason, []).append(key)
    parts = []
    for reason, keys in eager.items():
        costs = listed(list(dict.fromkeys(EAGER_COSTS[key_of_any_teacher(key)] for key in keys)))
        way_out = f"set {listed(keys)} to auto" if reason == BY_THE_RECIPE else "install what is missing"
        parts.append(f"eager on {device.type}: {listed(keys)} ({reason}); {costs}: {way_out}")
    return "; ".join(parts) or None


def _unmasked_documents(setup: Setup) -> str | None:
    packers = {name: manifest.packer.name for name, manifest in setup.data.sources.items()}
    unmasked = [name for name, packer in packers.items() if packer == "bestfit"]
    if not unmasked or setup.recipe.data.document_mask:
        return None
    which = "the data is" if len(packers) == 1 else f"{', '.join(unmasked)} of the sources are"
    return (
        f"{which} packed by bestfit, and the documents of a sequence attend to one another in this run; `evaluate` "
        "reads each by itself: data.document_mask=true trains as is measured"
    )


def _many_epochs(setup: Setup) -> str | None:
    batch, steps = setup.recipe.train.global_batch, setup.recipe.train.steps
    slots = slots_after([shape.pace for shape in setup.shapes], steps)
    read = setup.data.order(setup.recipe.data.seed).sequences_read(slots)
    sequences = {name: manifest.sequences for name, manifest in setup.data.sources.items()}
    many = {name: count for name, count in read.items() if count > USEFUL_EPOCHS * sequences[name]}
    if not many:
        return None
    if len(sequences) == 1:
        (size,), (count,) = sequences.values(), many.values()
        tokens = size * setup.data.sequence_length
        what = f"{short(count / size)} epochs of {tokens:,} tokens"
        way_out = f"train.steps={max(1, size // batch)} is one epoch, {max(1, USEFUL_EPOCHS * size // batch)} are four"
    else:
        what = ", ".join(f"{short(count / sequences[name])} epochs of {name}" for name, count in many.items())
        way_out = "give them less weight in data.curriculum, or more text"
    return (
        f"the run reads {what}: after about {USEFUL_EPOCHS} epochs, more add little (Muennighoff et al., 2305.16264); "
        f"{way_out}"
    )
