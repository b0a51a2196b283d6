"""A teacher in float8 against its native self on the first sequences of a split: a row of its results page.

    python -m benchmarks.float8_teacher TEACHER --data MANIFEST [--sequences 8] [--precision bfloat16]

Legend: S tokens of a sequence, E teacher width.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from megadistill.config.recipe import TeacherPrecision
from megadistill.distributed.vocab import VocabSlice
from megadistill.heldout.splits import load_splits
from megadistill.loss import Head, token_terms
from megadistill.models.families import load_config, logit_transform
from megadistill.precision import PRECISIONS, torch_dtype
from megadistill.teacher.stage import TeacherStage, head_rows

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    print(row(**vars(parser.parse_args())))


def row(teacher: Path, data: str, sequences: int, precision: str) -> str:
    """Tokens, bytes and cross-entropy of both, KL(native ‖ float8) and agreement, as a row of a table."""
    dtype = torch_dtype("bfloat16" if precision == "bfloat16" else "float32")
    (split,) = load_splits([data], sequences)
    batch = split.stream().batch(range(split.sequences))
    hidden, layer_bytes = {}, {}
    for kind in ("native", "float8"):
        precision_of: TeacherPrecision = "float8" if kind == "float8" else "native"
        stage = TeacherStage.load(teacher, stage=0, stages=1, dtype=dtype, device=CPU, precision=precision_of)
        hidden[kind] = torch.cat([stage(tokens_S.unsqueeze(0)).squeeze(0) for tokens_S in batch.tokens])
        layer_bytes[kind] = sum(tensor.nbytes for name, tensor in stage.weights() if name.startswith("layers."))
    vocab = VocabSlice.contiguous(0, split.manifest.vocab_size, split.manifest.vocab_size)
    weight = head_rows(teacher, vocab, dtype=dtype, device=CPU)
    transform = logit_transform(load_config(teacher, what="teacher"))

    def head(hidden_SE: Tensor) -> Head:
        return Head(hidden_SE, weight, None, transform)

    labels = batch.labels.flatten()
    native, float8 = head(hidden["native"]), head(hidden["float8"])
    terms = token_terms(float8, labels, vocab=vocab, teacher=native)
    assert terms.teacher is not None
    native_ce = token_terms(native, labels, vocab=vocab).cross_entropy.mean()
    sizes = " to ".join(f"{layer_bytes[kind] / 2**20:.1f}" for kind in ("native", "float8"))
    return (
        f"| {teacher.name} | {precision} | {len(labels):,} | {sizes} MiB | {native_ce:.4f} | "
        f"{terms.cross_entropy.mean():.4f} | {terms.teacher.kl.mean():.5f} | {terms.teacher.agreement.mean():.1%} |"
    )


if __name__ == "__main__":
    main()
