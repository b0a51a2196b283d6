"""The student under DeepSpeed's ZeRO-3: built, stepped, saved and restored. It knows no teacher and no loss.

Legend: B sequences, S tokens of a sequence, D width, w world.

DeepSpeed's silent traps (each has a test in tests/ranks/student/test_deepspeed_traps.py) are met here:
initialisation and RoPE under `zero.Init`, precision of accumulated gradients, names in checkpoints, `F.linear`
left patched, hyperparameters after a resume.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__ as compatible_ops
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Module

from megadistill.config import StudentSection, TrainSection
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import padded_vocabulary
from megadistill.models.families import EMBEDDING, HEAD, build_causal_lm, family, reading, rebuild_buffers
from megadistill.models.initial_weights import InitialWeights
from megadistill.models.initialise import initial_tensor
from megadistill.precision import Precision, torch_dtype
from megadistill.student.deepspeed_config import deepspeed_config
from megadistill.student.head import StudentHead

# DeepSpeed would compile this operator with the system's compiler at every start on a CPU (a minute, and a lock that
# hangs every later run when the build is killed). It serves inference alone.
compatible_ops["deepspeed_shm_comm"] = False

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed 0.19 calls torch 2.13's collectives by names that the next torch gives up.
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")

# What is saved of each parameter: the float32 master copy and AdamW's two moments.
OPTIMIZER_MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_KINDS = ("master", *OPTIMIZER_MOMENTS)

ReadRange = Callable[[str, int, int], Tensor]
"""(key, start, stop) -> elements start to stop of a flattened parameter's state, in float32."""


@dataclass(frozen=True)
class Partition:
    """This rank's piece of a flattened parameter: elements `start` to `stop` of `shape`, without ZeRO-3's padding."""

    name: str
    parameter: Any
    """The torch parameter, with the `ds_*` attributes that ZeRO-3 gives it."""
    shape: tuple[int, ...]
    start: int
    stop: int


def _hidden_states(self: Module, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """The student's forward: tokens [B, S] -> hidden [B, S, D] after the last norm. The head is the loss's work."""
    read = reading(tokens, positions)
    hidden: Tensor = self.model(**read).last_hidden_state  # type: ignore[operator]
    return hidden


def build_partitioned(
    config: Any,
    *,
    vocab_size: int,
    padded: int,
    seed: int | None,
    precision: Precision,
    rank: int,
    engine_config: dict[str, Any],
) -> Module:
    """A model whose parameters ZeRO-3 has partitioned, initialised the same for every world size.

    `seed` None: they are left as they are, for values that will be loaded.

    Inside `zero.Init` transformers initialises parameters of size 0 and casts RoPE's frequencies to bfloat16, so both
    are done again: each parameter is gathered alone and filled from an RNG keyed by its name, and the buffers are
    rebuilt outside. `forward` is replaced on the model itself: a wrapper would prefix every name in a checkpoint.
    """
    with deepspeed.zero.Init(config_dict_or_path=engine_config):
        model: Module = build_causal_lm(config, vocab_size=padded, dtype=torch_dtype(precision))
    if seed is not None:
        _initialise(model, config, vocab_size=vocab_size, seed=seed, rank=rank)
    rebuild_buffers(model)
    model.forward = MethodType(_hidden_states, model)
    return model


def _initialise(model: Module, config: Any, *, vocab_size: int, seed: int, rank: int) -> None:
    """Each parameter is gathered alone, and filled by rank 0."""
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                rows = vocab_size if name in (EMBEDDING, HEAD) else parameter.shape[0]  # padding rows stay zero
                shape, norm = (rows, *parameter.shape[1:]), family(config).norm_init
                values = initial_tensor(name, shape, std=config.initializer_range, seed=seed, norm=norm)
                parameter.data.zero_()
                parameter.data[:rows].copy_(values)


class StudentEngine:
    """A causal language model under ZeRO-3, and its head as a slice of the vocabulary.

    Where `section.weights` names a folder its parameters have no values until `load_weights` or `load_local_state`.

    Raises:
        UserError: sizes that do not fit the world (see `StudentHead` and `deepspeed_config`).
    """

    def __init__(
        self,
        config: Any,
        *,
        section: StudentSection,
        train: TrainSection,
        profile: dict[str, Any],
        vocab_size: int,
        seed: int,
        accumulation: int,
        topology: Topology,
    ) -> None:
        engine_config = deepspeed_config(profile, train, accumulation)
        padded = padded_vocabulary(vocab_size, section.vocab_multiple)
        model = build_partitioned(
            config,
            vocab_size=vocab_size,
            padded=padded,
            seed=seed if section.weights is None else None,
            precision=train.precision,
            rank=topology.rank,
            engine_config=engine_config,
        )
        if section.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        tied = bool(config.tie_word_embeddings)
        # The learning rate is set at each step from the run's own step count.
        self._optimizer = torch.optim.AdamW(
            _decay_groups(model, train.optimizer.weight_decay),
            lr=0.0,
            betas=(train.optimizer.beta1, train.optimizer.beta2),
            eps=train.optimizer.epsilon,
            fused=True,
        )
        self._config = config
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=engine_config)
        self._topology = topology
        self._model = model
        self._set_moments(steps=torch.zeros(()))
        head = model.get_parameter(EMBEDDING if tied else HEAD)
        self.head = StudentHead(head, vocab_size=vocab_size, tied=tied, topology=topology)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> hidden [B·S, D], differentiable; `positions` [B, S] restart where a document begins."""
        hidden: Tensor = self._engine(tokens, positions)
        return hidden.flatten(0, 1)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, a sum over this rank's tokens of globally weighted terms.

        ZeRO-3 averages over ranks; the loss times w makes that the sum over ranks. Nothing is divided by the
        accumulation: the weights of the tokens already are those of the whole step.
        """
        self._engine.backward(loss * self._topology.world, scale_wrt_gas=False)
        if self._engine.is_gradient_accumulation_boundary():
            self.head.flush_gradient(loss_scale=self._topology.world)

    def step(self, learning_rate: float) -> float | None:
        """One micro-batch done; at the end of an accumulation window, one optimizer step.

        Returns the global gradient norm before clipping at the end of a window, else None. A host-device sync.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if boundary else None

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name (Hugging Face's) -> shape of each parameter, the vocabulary padded; tied ones once."""
        return {partition.name: partition.shape for partition in self._partitions()}

    def replicated(self) -> list[tuple[str, Tensor]]:
        """Name and value of each parameter that every rank holds whole: those too small for ZeRO-3 to gather anew.

        Between steps they are the same everywhere. None before the first forward pass.
        """
        return [
            (name, parameter.detach())
            for name, parameter in ((each.name, each.parameter) for each in self._partitions())
            if parameter.ds_persist and parameter.ds_status == ZeroParamStatus.AVAILABLE
        ]

    @torch.no_grad()
    def params_differing_from_master(self) -> list[str]:
        """Names of the parameters of which this rank computes with something else than it optimizes. Between steps.

        What is optimized is the float32 master; computed with are this rank's piece of it in the model's precision
        and, where it holds the parameter whole, that piece of the whole. A host-device sync each.
        """
        whole = dict(self.replicated())
        unlike = []
        for partition in self._partitions():
            start, stop = partition.start, partition.stop
            piece = partition.parameter.ds_tensor[: stop - start]
            rounded = safe_get_local_fp32_param(partition.parameter)[: stop - start].to(piece.device, piece.dtype)
            copies = [piece]
            if partition.name in whole:
                copies.append(whole[partition.name].flatten()[start:stop].to(piece.device))
            if not all(_same_bits(copy, rounded) for copy in copies):
                unlike.append(partition.name)
        return unlike

    def distributions(self) -> dict[str, Tensor]:
        """This rank's pieces, flat and float32, of what is worth a look at: `weights/NAME`, `gradient_mean/NAME`.

        A step frees its gradients; their running mean, AdamW's first moment, stays.
        """
        found = {}
        for partition in self._partitions():
            keep = partition.stop - partition.start
            found[f"weights/{partition.name}"] = safe_get_local_fp32_param(partition.parameter)[:keep]
            mean = safe_get_local_optimizer_state(partition.parameter, "exp_avg")
            found[f"gradient_mean/{partition.name}"] = mean[:keep]
        return {name: piece.detach() for name, piece in found.items()}

    def local_state(self) -> dict[str, Tensor]:
        """This rank's share of the training state, flattened: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`.

        Float32, on the host, without ZeRO-3's padding: the pieces of the ranks, one after the other, are the
        parameter. `optimizer_step` is AdamW's count of applied steps.
        """
        state = {"optimizer_step": self._optimizer_step()}
        for partition in self._partitions():
            keep = partition.stop - partition.start
            state[f"master/{partition.name}"] = safe_get_local_fp32_param(partition.parameter)[:keep]
            for moment in OPTIMIZER_MOMENTS:
                state[f"{moment}/{partition.name}"] = safe_get_local_optimizer_state(partition.parameter, moment)[:keep]
        return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}

    @torch.no_grad()
    def load_local_state(self, read: ReadRange) -> None:
        """The inverse of `local_state`, from any number of ranks: each piece is read by its range of elements."""
        self._set_moments(steps=read("optimizer_step", 0, 1).reshape(()))
        for partition in self._partitions():
            piece = partition.parameter.ds_tensor
            padding = piece.numel() - (partition.stop - partition.start)
            values = {
                kind: torch.nn.functional.pad(
                    read(f"{kind}/{partition.name}", partition.start, partition.stop), (0, padding)
                )
                for kind in STATE_KINDS
            }
            safe_set_local_fp32_param(partition.parameter, values["master"])
            piece.copy_(values["master"])
            for moment in OPTIMIZER_MOMENTS:
                safe_set_local_optimizer_state(partition.parameter, values[moment], moment)
        self._refresh_copies()

    def load_weights(self, folder: Path) -> None:
        """The parameters of a Hugging Face folder of the same model, and no step taken: see `model.starting`.

        Each rank reads its own pieces; the master copies are what is stored, in float32. Collective.

        Raises:
            UserError: a tensor is missing, or cannot be read.
        """
        weights = InitialWeights(folder, self._config, vocab_size=self.head.vocab.size)
        shapes = self.parameters

        def read(key: str, start: int, stop: int) -> Tensor:
            kind, _, name = key.partition("/")
            return weights.read(name, shapes[name], start, stop) if kind == "master" else torch.zeros(stop - start)

        self.load_local_state(read)

    def _set_moments(self, *, steps: Tensor) -> None:
        """Zeros. AdamW would make its state at its first step, which a run may skip before it saves."""
        for flat in self._engine.optimizer.fp32_partitioned_groups_flat:
            self._optimizer.state[flat] = {
                "step": steps.to(flat.device, copy=True),
                **{moment: torch.zeros_like(flat) for moment in OPTIMIZER_MOMENTS},
            }

    def _refresh_copies(self) -> None:
        """Brings what ZeRO-3 holds beside the partitions up to what they hold now.

        Small parameters stay gathered between steps; hpZ keeps a second partition within each node, which is made
        anew from the first one when it is gone, and which letting a parameter go would fill with what it held before.
        """
        persistent = self._engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        self._engine.optimizer.invalidate_secondary_tensor()
        if persistent:
            persistent[0].all_gather(persistent)

    def _optimizer_step(self) -> Tensor:
        flat = self._engine.optimizer.fp32_partitioned_groups_flat[0]
        step: Tensor = self._optimizer.state[flat]["step"]
        return step.reshape(1)

    def _partitions(self) -> Iterator[Partition]:
        parameter: Any
        for name, parameter in self._model.named_parameters():
            numel = math.prod(parameter.ds_shape)
            size = parameter.ds_tensor.numel()
            start = min(self._topology.rank * size, numel)
            yield Partition(name, parameter, tuple(parameter.ds_shape), start, min(start + size, numel))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bytes, since a NaN is not equal to itself."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _decay_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (norms, biases) are not. Partitioned ones all have ndim 1: ds_shape tells."""
    parameters: list[Any] = list(model.parameters())
    matrices = [parameter for parameter in parameters if len(parameter.ds_shape) >= 2]
    vectors = [parameter for parameter in parameters if len(parameter.ds_shape) < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
