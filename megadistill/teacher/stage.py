"""One stage of the frozen teacher, and the rows of its LM head.

Legend: B sequences, S tokens of a sequence, E teacher width, v rows of this rank's vocabulary slice, u of them true.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from megadistill.config.recipe import TeacherPrecision
from megadistill.distributed.all_to_all import AllToAll
from megadistill.distributed.broadcast_reader import BroadcastReader, Layout
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.models.attention.sequence import share_sequences
from megadistill.models.families import EMBEDDING, HEAD, forward_inputs, load_config, rebuild_buffers, tensor_type
from megadistill.models.forward.hidden_streams import hidden_streams
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs, layer_part
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.layers import compile_layers
from megadistill.models.partition import stage_decoder, stage_layers
from megadistill.models.weights import read_parameter
from megadistill.teacher.cpu_linear import use_onednn
from megadistill.teacher.float8 import Float8Module, describe_float8, use_float8, weight_to_float8
from megadistill.units import number_of, readable

logger = logging.getLogger(__name__)


class Stage(Protocol):
    """The members of `TeacherStage` that `TeacherServer` reads."""

    @property
    def stage(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def reads_tokens(self) -> bool: ...
    def packet_shape(self, batch: int, sequence: int, /) -> tuple[int, int, int]: ...
    def __call__(self, x: Tensor, positions: Tensor | None, tokens: Tensor | None, /) -> Tensor: ...


class TeacherStage(nn.Module):
    """Consecutive layers of a frozen decoder. The first stage reads tokens [B, S], the others hidden states [B, S, E].

    The last stage ends in the final norm; no stage has the head, whose rows `head_rows` reads for the loss.
    """

    def __init__(self, decoder: Any, *, stage: int, stages: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.stage = stage
        self.stages = stages
        self.eval()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        stage: int,
        stages: int,
        dtype: torch.dtype,
        device: torch.device,
        precision: TeacherPrecision = "native",
        compiled: bool = False,
        attention: str | None = None,
        reader: BroadcastReader | None = None,
        sequence: Topology | None = None,
    ) -> "TeacherStage":
        """Stage `stage` of `stages` from a Hugging Face folder; only its own tensors are read and allocated.

        In bfloat16, the buffers stay in float32, and the routers' parameters that `tensor_type` names. The host's
        memory peaks at the stage (none of it, where `device` is another) and one parameter. In float8 so does the
        device's: each weight is rounded as soon as it is read.

        `compiled`: see `compile_parts`. `attention`: see `build_causal_lm`. `reader`: a rank that does not read opens
        no file of weights, and receives each parameter as the stage keeps it: in `dtype`, or rounded with its scales.
        That is exact, and the least that is sent without decoding a quantised folder again on every rank. Default:
        every rank reads. `sequence`: of ranks that may share sequences; None: they are read whole.

        Raises:
            UserError: the folder is no supported model, its weights do not fit its config, or it has too few layers.
        """
        config = load_config(folder, what=f"teacher {folder}")
        is_logged, reader = reader is not None, reader or BroadcastReader()
        opened = _OpenedOnce(folder)
        decoder, names = stage_decoder(config, stage=stage, stages=stages, attention=attention)
        layers = stage_layers(config, stages)[stage]
        shapes = {name: tensor.shape for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]}
        native = use_float8(decoder) if precision == "float8" else []
        for whole_name, name in names.items():
            own_type = tensor_type(config, whole_name, dtype)

            def read(whole_name: str = whole_name, name: str = name, own_type: torch.dtype = own_type) -> Tensor:
                part = layer_part(config, whole_name, layers)
                to: dict[str, Any] = {"dtype": own_type, "device": device, "part": part}
                return read_parameter(opened(), config, whole_name, shapes[name], **to)

            _place(decoder, name, read, shapes[name], reader, dtype=own_type, device=device)
        reader.finish()
        if is_logged:  # a run's own stage, not one of the layers that are read one after the other to compare
            logger.info("%s", _describe_reading(f"stage {stage} of {stages}", reader, opened))
        if precision == "float8":
            logger.info("%s", describe_float8(decoder, native, device))
        rebuild_buffers(decoder)
        left = [name for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()] if tensor.is_meta]
        assert not left, f"still on meta: {left}"
        if sequence is not None and sequence.sequence_group is not None:
            share_sequences(decoder, sequence.sequence_part, AllToAll(sequence.sequence_group))
        loaded = cls(decoder, stage=stage, stages=stages)
        if compiled:
            loaded.compile_parts()
        return loaded

    def compile_parts(self) -> None:
        """Compiles the layers, once for all of a kind, the final norm, and an embedding that scales.

        Each at its first call, for the sizes of that call and once more for others.
        """
        use_onednn(self.decoder)
        compile_layers(self.decoder)
        ends = [self.decoder.norm] if self.is_last else []
        if self.is_first and hasattr(self.decoder.embed_tokens, "embed_scale"):
            ends.append(self.decoder.embed_tokens)
        for part in ends:
            part.forward = torch.compile(part.forward, dynamic=False, fullgraph=True)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def dtype(self) -> torch.dtype:
        """The run's, which hidden states have: parameters of routers may be wider, and come first."""
        return min((parameter.dtype for parameter in self.parameters()), key=lambda dtype: dtype.itemsize)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def weights(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers; their names count the layers of this stage from 0."""
        where = f"of stage {self.stage} of {self.stages}"
        named = [*self.decoder.named_parameters(), *self.decoder.named_buffers()]
        return [(f"{name} {where}", tensor) for name, tensor in named]

    @property
    def reads_tokens(self) -> bool:
        """Whether later stages read tokens as well: their layers have inputs of their own."""
        return has_per_layer_inputs(self.decoder.config)

    def hidden_shape(self, batch: int, sequence: int) -> tuple[int, int, int]:
        """(B, S, E): the shape of the last stage's output."""
        return batch, sequence, int(self.decoder.config.hidden_size)

    def packet_shape(self, batch: int, sequence: int) -> tuple[int, int, int]:
        """(B, S, n·E): the shape of what a stage hands on to the next one; n is 1 but for Gemma 3n."""
        return batch, sequence, hidden_streams(self.decoder.config) * int(self.decoder.config.hidden_size)

    # Not inference mode: its tensors could not be saved for the student's backward pass.
    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Tokens [B, S] on the first stage, `packet_shape` on the others -> `packet_shape`, `hidden_shape` on the last.

        `positions`, `tokens`: see `forward_inputs`; where not `reads_tokens`, the tokens are not needed.
        Where ranks share sequences, all are this rank's part of each.
        """
        hidden = self.decoder(**forward_inputs(self.decoder, x, positions, tokens)).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden


class _OpenedOnce:
    """A folder of weights that is opened when it is first read: by a rank that reads, and by no other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights: SafetensorsFolder | None = None

    def __call__(self) -> SafetensorsFolder:
        if self.weights is None:
            self.weights = SafetensorsFolder(self.folder, mapped=False)
        return self.weights

    @property
    def bytes_read(self) -> int:
        return 0 if self.weights is None else self.weights.bytes_read


def _describe_reading(what: str, reader: BroadcastReader, opened: _OpenedOnce) -> str:
    """A log line."""
    by_broadcast = f", broadcast to {number_of(reader.receivers, 'other rank')}" if reader.receivers else ""
    return f"teacher: {what} read, {readable(opened.bytes_read, 'B')} in {reader.seconds:.1f} s{by_broadcast}"


def _place(
    decoder: Any,
    name: str,
    read: Callable[[], Tensor],
    shape: Size,
    reader: BroadcastReader,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Makes what is read the frozen parameter or the buffer `name`, or rounds it where its module is in float8."""
    place, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(place)
    if isinstance(module, Float8Module) and leaf in module.names:
        layouts = [Layout(part.shape, part.dtype) for part in module.parts(leaf)]
        rounded, scales = reader.tensors(layouts, lambda: weight_to_float8(read()), device=device)
        module.place(leaf, rounded, scales, dtype=dtype)
    else:
        (tensor,) = reader.tensors([Layout(shape, dtype)], lambda: [read()], device=device)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor, requires_grad=False))


def head_rows(
    folder: Path,
    vocab: VocabSlice,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ids: Tensor | None = None,
    reader: BroadcastReader | None = None,
) -> Tensor:
    """[v, E]: this rank's rows of the teacher's head; only they are read. From `vocab.size` on they are zero.

    `ids` [vocab.size] int64, on the host: the teacher's id of each of the student's, -1 where it has none: such a row
    is zero too, and `unknown_bias` keeps it out of the softmax. By default both have the same ids. `reader`: of the
    ranks with the same slice; by default every rank reads.

    Raises:
        UserError: the teacher's vocabulary is smaller than `vocab.size`, or than an id of `ids`.
    """
    config = load_config(folder, what=f"teacher {folder}")
    is_logged, reader = reader is not None, reader or BroadcastReader()
    opened = _OpenedOnce(folder)
    layout = Layout(Size([vocab.rows, config.hidden_size]), dtype)

    def read() -> list[Tensor]:
        name = EMBEDDING if config.tie_word_embeddings else HEAD
        return [_read_head_rows(opened(), name, vocab, dtype=dtype, device=device, ids=ids)]

    (rows_vE,) = reader.tensors([layout], read, device=device)
    reader.finish()
    if is_logged:
        logger.info("%s", _describe_reading("rows of the head", reader, opened))
    return rows_vE


def _read_head_rows(
    weights: SafetensorsFolder,
    name: str,
    vocab: VocabSlice,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ids: Tensor | None,
) -> Tensor:
    teacher_rows, folder = weights.shape(name)[0], weights.folder
    if ids is None and teacher_rows < vocab.size:
        raise UserError(
            f"the teacher in {folder} has {teacher_rows} vocabulary rows, the student's tokenizer has {vocab.size} "
            "ids: teacher and student must share a tokenizer, or teacher.vocab_map must say how the ids map"
        )
    if ids is not None and int(ids.max()) >= teacher_rows:
        raise UserError(
            f"teacher.vocab_map: holds id {int(ids.max())}, the teacher in {folder} has {teacher_rows} vocabulary rows"
        )
    true_ids_u = vocab.global_ids()[: vocab.true_rows]
    teacher_ids_u = true_ids_u if ids is None else ids[true_ids_u]
    known_u = teacher_ids_u >= 0
    rows_vE = torch.zeros(vocab.rows, weights.shape(name)[1], dtype=dtype, device=device)
    known_rows = weights.rows(name, _consecutive_ranges(teacher_ids_u[known_u]))
    rows_vE[: vocab.true_rows][known_u.to(device)] = known_rows.to(device, dtype)
    return rows_vE


def unknown_bias(vocab: VocabSlice, ids: Tensor, *, device: torch.device) -> Tensor | None:
    """[v] float32: -inf in the rows of this rank that the teacher has no id for, else 0. None where it has all of them.

    `ids` as for `head_rows`. Every rank of the group gets a bias, or none does.
    """
    if bool((ids >= 0).all()):
        return None
    bias_v = torch.zeros(vocab.rows)
    bias_v[: vocab.true_rows][ids[vocab.global_ids()[: vocab.true_rows]] < 0] = -math.inf
    return bias_v.to(device)


def _consecutive_ranges(ids: Tensor) -> list[tuple[int, int]]:
    """The ids as half-open ranges, in their order: a range for each stretch of consecutive ids."""
    breaks = ids.diff() != 1
    edges = breaks.new_ones(min(1, len(ids)))
    starts, lasts = ids[torch.cat([edges, breaks])], ids[torch.cat([breaks, edges])]
    return list(zip(starts.tolist(), (lasts + 1).tolist(), strict=True))
