"""The student under DeepSpeed's ZeRO-3: construction, forward, backward and optimizer step.

Legend: B sequences, S tokens of a sequence, D width, w ranks of a replica.

Handles DeepSpeed's silent traps, each with a test in tests/ranks/student/test_deepspeed_traps.py: initialisation and
RoPE under `zero.Init`, precision of accumulated gradients, names in checkpoints, a patched `F.linear`, hyperparameters
after a resume.
"""

import logging
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor
from torch.nn import Module

from megadistill.config.auto import choose_compile
from megadistill.config.recipe import StudentSection, TrainSection
from megadistill.distributed.all_to_all import AllToAll
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import padded_vocabulary
from megadistill.models.attention.sequence import share_sequences
from megadistill.models.experts import routers
from megadistill.models.families import (
    EMBEDDING,
    HEAD,
    build_causal_lm,
    decoder,
    forward_inputs,
    rebuild_buffers,
)
from megadistill.models.initial_weights import InitialWeights, RandomWeights
from megadistill.models.layers import checkpoint_layers, compile_layers, offload_layer_inputs
from megadistill.precision import torch_dtype
from megadistill.student.deepspeed_config import RANKS_OF_A_SMALL_WORLD, build_engine_config, with_layer_prefetch
from megadistill.student.deepspeed_overhead import remove_overhead
from megadistill.student.flat_step import FlatStep
from megadistill.student.head import StudentHead
from megadistill.student.norms import StepNorms
from megadistill.student.optimizer import MASTER, build_optimizer
from megadistill.student.persistent import keep_gathered
from megadistill.student.rope import turn_rotary
from megadistill.student.routers import Routers, RouterSums
from megadistill.student.state import StudentState
from megadistill.student.zero_init import EmptyInit, without_gathers

remove_overhead()

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed 0.19 calls torch's collectives by names that torch 2.13 to 2.15 have, and warn of.
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")


def _hidden_states(self: Module, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """The student's forward pass: tokens [B, S] -> hidden [B, S, D] after the last norm. The loss applies the head."""
    inner: Any = self.model
    hidden: Tensor = inner(**forward_inputs(inner, tokens, positions)).last_hidden_state
    return hidden


def _make_leaves(layers: Any) -> list[list[int]]:
    """Makes each layer a leaf of ZeRO-3: its parameters are gathered, released and reduced together.

    DeepSpeed puts no hooks inside a leaf, so that its forward pass is a function of whole tensors, which torch can
    checkpoint and compile. Returns the sizes of each layer's parameters.
    """
    for layer in layers:
        set_z3_leaf_module(layer, True)
    return [[parameter.ds_numel for parameter in layer.parameters()] for layer in layers]


def _release_early(embedding: Any) -> None:
    """Has ZeRO-3 release the embedding after its lookup. Call it after `deepspeed.initialize`.

    DeepSpeed looks for the next use of a module that is no leaf without counting the parameters of leaves before it
    (`__params_to_release`), and would hold the embedding from the forward to the backward pass. The mark of a leaf has
    it count them. Before `initialize` the mark would take its gradient in the hook of a leaf, which torch calls before
    the gradient exists, since token ids have none.
    """
    set_z3_leaf_module(embedding, True)


def _restore_buffers(model: Module, buffers: dict[str, Tensor]) -> None:
    """Puts back the buffers from before `deepspeed.initialize`, which casts them to bfloat16 in deepspeed 0.19.0.

    The modules must be those that it has prepared.
    """
    for name, values in buffers.items():
        module, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(module), buffer, values)


class StudentEngine:
    """A causal language model under ZeRO-3, and its head as a slice of the vocabulary.

    Its parameters have no values until `draw_weights`, `load_weights` or `state.load`, and its construction moves none
    between ranks. `attention`: see `build_causal_lm`.

    Raises:
        UserError: sizes that do not fit the world (see `StudentHead` and `build_engine_config`).
    """

    def __init__(
        self,
        config: Any,
        *,
        section: StudentSection,
        train: TrainSection,
        deepspeed_config: dict[str, Any],
        vocab_size: int,
        accumulation: int,
        topology: Topology,
        attention: str | None = None,
    ) -> None:
        engine_config = build_engine_config(
            deepspeed_config, train, accumulation, ranks=topology.shard_world, replicas=topology.replicas
        )
        padded = padded_vocabulary(vocab_size, section.vocab_multiple, ranks=topology.shard_world)
        self._dtype = torch_dtype(train.precision)
        with EmptyInit(config_dict_or_path=engine_config):
            model: Module = build_causal_lm(
                config, vocab_size=padded, dtype=self._dtype, attention=attention, initialise=False
            )
        rebuild_buffers(model)  # `zero.Init` casts RoPE's frequencies to bfloat16
        buffers = dict(model.named_buffers(remove_duplicate=False))
        model.forward = MethodType(_hidden_states, model)  # a wrapper would prefix every name in a checkpoint
        modules = routers(decoder(model))
        self.routers = Routers(modules, decoder(model).layers) if modules else None
        """None for a student without experts."""
        if topology.sequence_group is not None:
            share_sequences(decoder(model), topology.sequence_part, AllToAll(topology.sequence_group))
        checkpoint_layers(decoder(model), section.activation_checkpointing)
        if choose_compile(section.compile, accelerator=topology.device.type != "cpu").value == "compiled":
            compile_layers(decoder(model))
        if section.activation_offload:
            offload_layer_inputs(decoder(model))
        engine_config = with_layer_prefetch(engine_config, _make_leaves(decoder(model).layers))
        tied = bool(config.tie_word_embeddings)
        self._optimizer = build_optimizer(train.optimizer, model.named_parameters())
        self._config = config
        with without_gathers(model.parameters()):
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=engine_config)
        _restore_buffers(model, buffers)
        _release_early(decoder(model).embed_tokens)
        if topology.shard_world > RANKS_OF_A_SMALL_WORLD:
            keep_gathered(self._engine.optimizer, decoder(model).norm)
        self._flat_step = flat_step = FlatStep.install(self._engine.optimizer, topology)
        self.norms: StepNorms | None = None
        """Norms by layer, of the steps that they are requested for; None with an optimizer on NVMe."""
        if flat_step is not None:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            self.norms = flat_step.norms = StepNorms(self._engine.optimizer, names, topology, rank=topology.shard_rank)
        topology.limit_all_groups()  # DeepSpeed has made a clone of the world, and hpZ's groups
        self._topology = topology
        self._model = model
        self.state = StudentState(
            model, self._engine.optimizer, self._optimizer, train.optimizer, rank=topology.shard_rank
        )
        head = model.get_parameter(EMBEDDING if tied else HEAD)
        self.head = StudentHead(head, vocab_size=vocab_size, tied=tied, topology=topology)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> hidden [B·S, D], differentiable; `positions` [B, S] restart where a document begins.

        Where ranks share sequences, tokens are this rank's part of each, and positions those of whole sequences.
        """
        return self._forward(tokens, positions, None)

    def routed_hidden(
        self, tokens: Tensor, positions: Tensor | None, token_weights: Tensor, *, differentiable: bool
    ) -> tuple[Tensor, RouterSums | None]:
        """`hidden`, and what its routers did with the tokens; None for a student without experts.

        Args:
            token_weights: [B·S] float32.
            differentiable: whether the sums have gradients.
        """
        hidden = self._forward(tokens, positions, token_weights, differentiable=differentiable)
        return hidden, None if self.routers is None else self.routers.end()

    def _forward(
        self, tokens: Tensor, positions: Tensor | None, token_weights: Tensor | None, *, differentiable: bool = False
    ) -> Tensor:
        assert self.state.has_values, "the student's parameters were given no values"
        if self.routers is not None:
            self.routers.begin(token_weights, differentiable=differentiable)
        hidden: Tensor = self._engine(tokens, positions)
        return hidden.flatten(0, 1)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, a sum over this rank's tokens of globally weighted terms.

        ZeRO-3 averages over the ranks of a replica; the loss times w makes that the sum over them, and the optimizer
        step adds the sums of replicas (see `FlatStep`). There is no division by the
        accumulation steps: the token weights are those of the whole step. The head's gradient is not accumulated here:
        the loss's forward pass has added it to `head.gradient()`.
        """
        self._engine.backward(loss * self._topology.shard_world, scale_wrt_gas=False)
        if self._engine.is_gradient_accumulation_boundary():
            self.head.flush_gradient()

    def step(self, learning_rate: float) -> float | None:
        """Ends a micro-batch and, at the end of an accumulation window, takes one optimizer step.

        Returns the global gradient norm before clipping at the end of a window, else None. A host-device sync.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if boundary else None

    def begin_again(self, topology: Topology, *, accumulation: int) -> None:
        """Drops what was accumulated since the last step. `topology` and `accumulation`: of the steps from now on.

        With replicas that come and go, which an optimizer on NVMe is refused with.
        """
        assert self._flat_step is not None, "the optimizer's step is DeepSpeed's"
        self._topology = topology
        self._flat_step.begin_again(topology)
        self.head.drop_gradient()
        self._engine._config.gradient_accumulation_steps = accumulation
        self._engine.micro_steps = 0

    def begin_entry(self, config: Any, *, accumulation: int) -> None:
        """Takes the steps of another shape from now on. Call it between two steps.

        `config`: the student's, with the rotary embeddings in force; `accumulation`: micro-batches of a step.
        """
        self._engine._config.gradient_accumulation_steps = accumulation
        self._engine.micro_steps = 0  # the boundary of a step is at a multiple of the accumulation
        turn_rotary(self._model, config)

    def load_weights(self, folder: Path) -> None:
        """Loads the parameters of a Hugging Face folder of the same model, as step 0; see `InitialWeights`.

        Each rank reads its own pieces; the master weights are the stored ones, in float32.

        Raises:
            UserError: a tensor is missing, or cannot be read.
        """
        self._begin_with(InitialWeights(folder, self._config, vocab_size=self.head.vocab.size))

    def draw_weights(self, seed: int) -> None:
        """Draws initial values by a seed, as step 0: each rank its own pieces. The same for every world size."""
        self._begin_with(RandomWeights(self._config, vocab_size=self.head.vocab.size, seed=seed, dtype=self._dtype))

    def _begin_with(self, weights: InitialWeights | RandomWeights) -> None:
        shapes = self.state.shapes

        def read(key: str, start: int, stop: int) -> Tensor:
            kind, _, name = key.partition("/")
            return weights.read(name, shapes[name], start, stop) if kind == MASTER else torch.zeros(stop - start)

        self.state.load(read)
