"""Losses of the routers of a student with experts, and the load of its experts, over the global batch of a step.

Legend: L layers with experts, E experts of a layer, K experts of a token.

The load-balancing loss of a layer is that of the Switch transformer (Fedus et al., 2101.03961), as in transformers'
`load_balancing_loss_func`: E · Σ f_i · P_i, with f_i the tokens of expert i over all tokens, which has no gradient, and
P_i the mean of its probability. It is K where all experts have the same load. The z-loss is the mean of (log Z)² of the
logits (Zoph et al., 2202.08906). Both are means over the layers, and over the tokens that have a label.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.models.experts import RouterCoefs, number_of_experts
from megadistill.student.engine import StudentEngine
from megadistill.student.routers import RouterSums
from megadistill.train.lookahead import StepBatch
from megadistill.types import EXPERT_METRICS, IGNORED_LABEL
from megadistill.units import number_of


@dataclass(frozen=True)
class RouterLosses:
    """The losses of one step. A token's weight is 1 / valid tokens of the global batch, 0 where it has no label."""

    coefs: RouterCoefs
    tokens: Tensor
    """[] valid tokens of the global batch."""
    topology: Topology
    load_LE: Tensor | None
    """f of each expert in the global batch; None: counted in the forward pass of a step with one micro-batch."""

    @classmethod
    def of(
        cls, student: StudentEngine, batch: StepBatch, *, coefs: RouterCoefs, tokens: Tensor, topology: Topology
    ) -> "RouterLosses":
        """Counts the load first where gradients are accumulated, by forward passes over the step's micro-batches.

        The gradient of a micro-batch depends on the load in all of them. Collective.
        """
        counted = cls(coefs, tokens, topology, None)
        if coefs.aux == 0 or batch.accumulation == 1:
            return counted
        tokens_LE: Tensor | None = None
        with torch.no_grad(), timeline.span(timeline.COMPUTE, "count the experts' tokens"):
            for micro in batch.batch.micro_batches(len(batch.batch) // batch.accumulation):
                moved = micro.to(topology.device)
                weights_N = token_weights(moved.labels.flatten(), tokens)
                _, sums = student.routed_hidden(moved.tokens, moved.positions, weights_N, differentiable=True)
                assert sums is not None
                tokens_LE = sums.tokens_LE if tokens_LE is None else tokens_LE + sums.tokens_LE
        assert tokens_LE is not None
        return cls(coefs, tokens, topology, counted.load(tokens_LE))

    def load(self, tokens_LE: Tensor) -> Tensor:
        """[L, E] float32: f of each expert, of this rank's tokens of each. Collective."""
        with timeline.span(timeline.WAIT, "count the experts' tokens"):
            total_LE = all_reduce_sum(tokens_LE.double(), self.topology.world_group)
        return (total_LE / self.tokens).float()

    def loss(self, sums: RouterSums) -> Tensor:
        """[] float32: a micro-batch's part of the losses, times their weights; the parts add up. Collective."""
        loss = self.coefs.z * sums.log_z_squared_L.mean()
        if self.coefs.aux == 0:
            return loss
        load_LE = self.load(sums.tokens_LE) if self.load_LE is None else self.load_LE
        return loss + self.coefs.aux * load_balancing(load_LE, sums.probabilities_LE)


def describe_routers(config: Any, layers: int, coefs: RouterCoefs, *, accumulation: int) -> str:
    """A log line: the experts of a student of this config, which has them in `layers` layers, and their losses."""
    line = (
        f"experts: {number_of_experts(config)} in each of {number_of(layers, 'layer')}, {config.num_experts_per_tok} "
        f"for a token; balance loss {coefs.aux:g}, z-loss {coefs.z:g}"
    )
    if coefs.aux > 0 and accumulation > 1:
        line += f"; their load in {accumulation} micro-batches is counted by one more forward pass"
    return line


def token_weights(labels_N: Tensor, tokens: Tensor) -> Tensor:
    """[N] float32: 1 / `tokens`, the valid tokens of the global batch; 0 where there is no label."""
    return (labels_N != IGNORED_LABEL).to(torch.float32).div_(tokens.to(torch.float32))


def load_balancing(load_LE: Tensor, probabilities_LE: Tensor) -> Tensor:
    """[]: the load-balancing loss, for f of each expert and a (part of the) mean of its probability."""
    return load_LE.shape[1] * (load_LE * probabilities_LE).sum(dim=1).mean()


def router_numbers(sums: RouterSums) -> Tensor:
    """[L · (2E + 1)] float64: the sums of a micro-batch side by side, for one reduction."""
    parts = (sums.tokens_LE, sums.probabilities_LE, sums.log_z_squared_L)
    return torch.cat([part.detach().double().flatten() for part in parts])


@dataclass(frozen=True)
class ExpertLoad:
    """Load of the experts and losses of the routers in a step, over its global batch."""

    layers: tuple[int, ...]
    """Numbers of the layers with experts."""
    tokens: list[list[float]]
    """[L][E]: tokens of each expert; a token counts for each of its experts."""
    aux_loss: float
    """The load-balancing loss, without its weight."""
    z_loss: float
    """The z-loss, without its weight."""

    @classmethod
    def of(cls, numbers: Sequence[float], layers: tuple[int, ...], *, valid_tokens: float) -> "ExpertLoad":
        """`numbers`: `router_numbers`, summed over micro-batches and ranks."""
        L = len(layers)
        E = (len(numbers) // L - 1) // 2
        values = torch.tensor(numbers, dtype=torch.float64)
        tokens_LE, probabilities_LE = values[: 2 * L * E].view(2, L, E)
        aux_loss = load_balancing(tokens_LE / valid_tokens, probabilities_LE)
        return cls(layers, tokens_LE.tolist(), float(aux_loss), float(values[2 * L * E :].mean()))

    def by_layer(self) -> dict[str, list[float]]:
        """Number of a layer -> `relative` load of its experts, to four decimals."""
        loads = zip(self.layers, relative(self.tokens), strict=True)
        return {str(layer): [round(load, 4) for load in loads_E] for layer, loads_E in loads}

    def summary(self) -> dict[str, float]:
        """The numbers of every step, by `EXPERT_METRICS`."""
        loads = [load for layer in relative(self.tokens) for load in layer]
        entropies = [_entropy(layer) / math.log(max(2, len(layer))) for layer in self.tokens]
        values = (
            max(loads),
            min(loads),
            sum(entropies) / len(entropies),
            sum(load == 0 for load in loads) / len(loads),
            self.aux_loss,
            self.z_loss,
        )
        return dict(zip(EXPERT_METRICS, values, strict=True))


def relative(tokens: Sequence[Sequence[float]]) -> list[list[float]]:
    """[L][E]: load of each expert over that of an even distribution, by its tokens; 1 is even, 0 idle."""
    return [[len(layer) * each / max(1.0, sum(layer)) for each in layer] for layer in tokens]


def _entropy(counts: Sequence[float]) -> float:
    """Entropy (nats) of a distribution by its counts."""
    total = max(1.0, sum(counts))
    return -sum(each / total * math.log(each / total) for each in counts if each > 0)
