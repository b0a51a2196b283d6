"""Models on a held-out split: cross-entropy, perplexity, bits a byte, KL and agreement. One process; it trains nothing.

Legend: N tokens of a batch, V true vocabulary, D and E widths of a model and of the teacher.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from megadistill.comm.topology import local_device
from megadistill.data import Manifest, TokenStream, tokenizer_sha256
from megadistill.errors import OperatorFault, UserError
from megadistill.loss import Divergence, VocabSlice, distill_loss, label_loss
from megadistill.model.families import decoder, logit_transform, reading
from megadistill.model.weights import load_pretrained
from megadistill.records import IGNORED_LABEL, LossTerms, TokenBatch


@dataclass(frozen=True)
class Evaluation:
    """One model on one split; means over its tokens, in nats unless they say otherwise."""

    model: str
    parameters: int
    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    """None where the split does not say how many bytes of text it holds."""
    kl: float | None
    """KL of the teacher against the model; None without a teacher."""
    agreement: float | None
    """Share of positions where both have the same most likely token."""


def evaluate(models: Sequence[Path], data: Path, *, teacher: Path | None, batch: int) -> list[Evaluation]:
    """Every model of `models`, and the teacher first, on every sequence of the split that `data` describes.

    The teacher runs once a batch, however many models are compared with it.

    Raises:
        UserError: a folder is no model of a supported family, or its vocabulary is smaller than the split's.
    """
    if batch < 1:
        raise UserError(f"--batch {batch}: a forward pass needs at least one sequence")
    manifest = Manifest.load(data)
    device = local_device(0)
    folders = [
        *([teacher] if teacher else []),
        *(m for m in models if teacher is None or m.resolve() != teacher.resolve()),
    ]
    loaded = [_load(folder, manifest, device) for folder in folders]
    judge = loaded[0] if teacher else None
    masked = manifest.packer.name == "bestfit"  # whole documents side by side: what was packed together is chance
    stream = TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1, document_mask=masked)
    totals = [torch.zeros(3, dtype=torch.float64) for _ in loaded]
    tokens = 0
    with Progress(transient=True) as progress, torch.no_grad():
        task = progress.add_task("evaluating", total=manifest.units)
        for start in range(0, manifest.units, batch):
            held = stream.batch(range(start, min(start + batch, manifest.units))).to(device)
            tokens += held.valid_tokens
            judged = _hidden(judge, held) if judge is not None else None
            for total, model in zip(totals, loaded, strict=True):
                total += _sums(model, held, judge, judged, manifest.vocab_size)
            progress.advance(task, len(held))
    names = _short_names(folders)
    for name, total in zip(names, totals, strict=True):
        if not total.isfinite().all():
            raise OperatorFault(f"{name}: its cross-entropy, KL or agreement is not finite: look at its weights")
    return [
        _evaluation(name, model, total / tokens, tokens, manifest, with_teacher=teacher is not None)
        for name, model, total in zip(names, loaded, totals, strict=True)
    ]


def table(results: Sequence[Evaluation]) -> Table:
    """The evaluations as a table that fits a terminal of 80 columns."""
    shown = Table(
        title=f"held-out split, {results[0].tokens:,} tokens",
        caption="CE: cross-entropy, nats a token. KL and agreement: with the teacher.",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("model", overflow="fold")
    for heading in ("parameters", "CE", "perplexity", "bits/byte", "KL", "agree"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        shown.add_row(
            result.model,
            f"{result.parameters:,}",
            f"{result.cross_entropy:.4f}",
            f"{result.perplexity:.2f}",
            "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
            "-" if result.kl is None else f"{result.kl:.4f}",
            "-" if result.agreement is None else f"{result.agreement:.1%}",
        )
    return shown


def write_json(results: Sequence[Evaluation], path: Path) -> None:
    """The evaluations as a JSON list, one object a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps([asdict(result) for result in results], indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def _load(folder: Path, manifest: Manifest, device: torch.device) -> Any:
    model = load_pretrained(folder, what=str(folder), device=device)
    if model.config.vocab_size < manifest.vocab_size:
        raise UserError(
            f"{folder}: a vocabulary of {model.config.vocab_size} ids, the split was made with {manifest.vocab_size}; "
            "an evaluation reads no teacher.vocab_map: all models must have the split's ids"
        )
    if model.config.max_position_embeddings < manifest.sequence_length:
        raise UserError(
            f"{folder}: {model.config.max_position_embeddings} positions, the split has sequences of "
            f"{manifest.sequence_length} tokens"
        )
    found = tokenizer_sha256(folder, prefer=manifest.tokenizer.kind)
    if found is not None and found != (manifest.tokenizer.kind, manifest.tokenizer.sha256):
        file = manifest.tokenizer.file.rpartition("/")[2]
        raise UserError(
            f"{folder}: its {file} is not the one that the split was made with, and an evaluation reads no "
            "teacher.vocab_map: tokenize a split with this model's own"
        )
    return model


def _hidden(model: Any, batch: TokenBatch) -> Tensor:
    """[N, D]: final hidden states, which the head has not read yet."""
    hidden: Tensor = decoder(model)(**reading(batch.tokens, batch.positions)).last_hidden_state
    return hidden.flatten(0, 1)


def _sums(model: Any, batch: TokenBatch, judge: Any, judged: Tensor | None, vocab_size: int) -> Tensor:
    """[3] float64: sums over the batch of cross-entropy, KL and agreement."""
    hidden = judged if model is judge and judged is not None else _hidden(model, batch)
    labels = batch.labels.flatten()
    weights = (labels != IGNORED_LABEL).float()
    head = model.get_output_embeddings().weight[:vocab_size]
    vocab = VocabSlice.contiguous(0, vocab_size, size=vocab_size)
    terms: LossTerms
    if judged is None:
        terms = label_loss(
            hidden, head, labels, token_weights=weights, vocab=vocab, student_logits=logit_transform(model.config)
        )
    else:
        terms = distill_loss(
            hidden,
            head,
            judged,
            judge.get_output_embeddings().weight[:vocab_size],
            labels,
            token_weights=weights,
            divergence=Divergence(),
            vocab=vocab,
            student_logits=logit_transform(model.config),
            teacher_logits=logit_transform(judge.config),
        )
    return torch.stack([terms.student_ce, terms.kl, terms.agreement]).double().cpu()


def _evaluation(
    name: str, model: Any, means: Tensor, tokens: int, manifest: Manifest, *, with_teacher: bool
) -> Evaluation:
    cross_entropy, kl, agreement = means.tolist()
    bytes_per_token = manifest.text_bytes / manifest.tokens if manifest.text_bytes is not None else None
    return Evaluation(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=tokens,
        cross_entropy=cross_entropy,
        perplexity=math.exp(cross_entropy),
        bits_per_byte=cross_entropy / math.log(2) / bytes_per_token if bytes_per_token is not None else None,
        kl=kl if with_teacher else None,
        agreement=agreement if with_teacher else None,
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders without the parts that they all share."""
    parts = [folder.resolve().parts for folder in folders]
    shared = 0
    while len(folders) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) if len(folders) > 1 else p[-1] for p in parts]
