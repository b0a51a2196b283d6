"""How far a teacher in float8 is from its native self, measured before a run's first step.

The native teacher is computed a layer at a time on rank 0, from the files: no rank ever holds a native stage beside the
one in float8. It costs one reading of the weights at the first start, whose result is recorded with the probe.

Legend: K tokens of the probe, E teacher width.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megadistill.distributed.collectives import broadcast_object
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.loss import Head, token_terms
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.precision import torch_dtype
from megadistill.teacher.stage import TeacherStage
from megadistill.train.setup.setup import Setup

NO_PROBABILITY = -1e4
"""A finite logit whose probability is 0 in float32, beside any logit of a model."""


@dataclass(frozen=True)
class Float8Difference:
    """The float8 teacher against the native one: means over the probe's tokens, in nats."""

    kl: float
    """KL(native ‖ float8)."""
    native_ce: float
    float8_ce: float

    @property
    def line(self) -> str:
        """A log line."""
        return (
            f"float8 teacher: KL to the native one {self.kl:.5f} nats a token, cross-entropy {self.float8_ce:.4f} "
            f"instead of {self.native_ce:.4f}"
        )

    def problem(self, bound: float) -> str | None:
        """One line, if the KL is above `bound`, or is no number."""
        if self.kl <= bound:
            return None
        return (
            f"teacher.precision float8: the KL to the native teacher is {self.kl:.4g} nats a token on the first tokens "
            f"of the data, above teacher.float8_max_kl {bound:g} (cross-entropy {self.float8_ce:.4f} instead of "
            f"{self.native_ce:.4f}): set teacher.precision to native and name another run.folder, or raise the bound"
        )


def require_close(difference: Float8Difference, bound: float, topology: Topology) -> None:
    """
    Raises:
        UserError: on every rank, where the KL is above the bound.
    """
    problem = difference.problem(bound)
    if problem is not None:
        raise UserError(problem if topology.is_first else "the float8 teacher is refused: rank 0 says why")


def float8_difference(
    setup: Setup, topology: Topology, vocab: VocabSlice, *, tokens: Tensor, float8: Head
) -> Float8Difference:
    """Compares the float8 teacher's hidden states [K, E] and head with the native teacher's. Collective over the world.

    Args:
        tokens: [K] int64, the student's ids, on the host.
    """
    ids = setup.vocab_map
    read = tokens if ids is None else ids[tokens]
    hidden_KE = broadcast_object(
        native_hidden(setup, read, topology.device).cpu() if topology.is_first else None, topology.world_group
    )
    assert hidden_KE is not None, "the first rank has them"
    rounded = replace(float8, hidden=float8.hidden[:-1])
    native = replace(float8, hidden=hidden_KE[:-1].to(topology.device, float8.hidden.dtype))
    labels = tokens[1:].to(topology.device)
    entropies = [token_terms(head, labels, vocab=vocab).cross_entropy for head in (native, rounded)]
    # Ids that the teacher does not know have no probability in either: the loss takes -inf of a teacher alone.
    bias = None if float8.bias is None else float8.bias.clamp(min=NO_PROBABILITY)
    against = token_terms(replace(rounded, bias=bias), labels, vocab=vocab, teacher=replace(native, bias=bias)).teacher
    assert against is not None
    means = [float(each.double().mean()) for each in (against.kl, *entropies)]
    return Float8Difference(*broadcast_object(means, topology.world_group))


def native_hidden(setup: Setup, tokens: Tensor, device: torch.device) -> Tensor:
    """[K, E]: final hidden states of one document, the teacher's ids `tokens` [K], with one layer in memory at a time.

    With several, where they share what one of them computes.

    Raises:
        UserError: the folder cannot be read.
    """
    assert setup.recipe.teacher is not None, "a run from labels has no teacher"
    assert setup.teacher_config is not None, "stored targets have no model"
    folder, stages = Path(str(setup.recipe.teacher.path)), len(first_layers(setup.teacher_config))
    dtype = torch_dtype(setup.recipe.train.precision)
    x = tokens_1K = tokens.unsqueeze(0).to(device)
    for stage in range(stages):
        x = TeacherStage.load(folder, stage=stage, stages=stages, dtype=dtype, device=device)(x, tokens=tokens_1K)
    return x.squeeze(0)
