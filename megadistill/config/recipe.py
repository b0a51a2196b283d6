"""The recipe as frozen pydantic models, one per section. Paths are relative to the current directory."""

import math
import re
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from megadistill.config.bounds import (
    MAX_BATCHES,
    MAX_IDS,
    MAX_KL,
    MAX_MEGABYTES,
    MAX_MINUTES,
    MAX_MULTIPLE,
    MAX_RANKS,
    MAX_RATE,
    MAX_ROPE_THETA,
    MAX_SECONDS,
    MAX_SEED,
    MAX_SEQUENCE,
    MAX_SEQUENCES,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOKENS,
    MAX_WEIGHT,
    MAX_WINDOW,
    MAX_ZSCORE,
    MIN_EPSILON,
    MIN_TEMPERATURE,
    SequenceNumber,
    Share,
    Step,
)
from megadistill.divergence import DivergenceKind, parameter_owners, require_parameter
from megadistill.errors import UserError, nearest
from megadistill.precision import Precision
from megadistill.redaction import redacted, without_url_secrets
from megadistill.units import number_of

MAX_TIMELINE_STEPS = 100

MAX_HELD_OUT_SPLITS = 64

MAX_TEACHERS = 16

WHOLE_DATA = "data"
"""Name of the one source of `data.manifest`."""

MAX_PROFILE_STEPS = 20

Checkpointing: TypeAlias = Literal["none", "selective", "full"]
"""Parts of a layer that the backward pass recomputes: more from left to right."""

CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)

AttentionSetting: TypeAlias = Literal["auto", "eager", "sdpa", "flex", "flash"]

CompileSetting: TypeAlias = bool | Literal["auto"]

TeacherPrecision: TypeAlias = Literal["native", "float8"]

WARMUP_FRACTION, MAX_WARMUP_STEPS = 0.05, 2000
"""Default warm-up: the fraction of Wortsman et al. (2309.14322), up to the steps of LLaMA (2302.13971)."""

MAX_WARMUP_TOKENS = 8_000_000_000
"""The same in tokens: 2000 steps of LLaMA's 4 million."""

MILESTONE_CHECKPOINTS = 10
"""Default of `checkpoint.keep_every`, in checkpoints."""


class Section(BaseModel):
    """A frozen part of the recipe that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections of a key's annotation, such as `list[Entry]` or `A | B | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


class RunSection(Section):
    folder: str = Field(min_length=1)
    """Run folder: all output of the run goes there."""
    begin_from: str | None = Field(default=None, min_length=1)
    """Checkpoint of another run (`RUN/checkpoints/step-…`, or RUN for its newest) from which a new run begins: weights,
    optimizer, position in the data and step. Read by the first start of `folder` alone."""
    seed: int = Field(default=1, ge=0, le=MAX_SEED)
    """Seed of the student's initialisation."""
    time_limit_minutes: float | None = Field(default=None, gt=0, le=MAX_MINUTES)
    """Time limit of one start (minutes): the run saves and stops after the step that exceeds it. None: no limit."""
    timeline: list[Step] | None = None
    """[first, last]: steps that every rank records for `megadistill timeline`. None: none."""

    @model_validator(mode="after")
    def _timeline_is_a_range(self) -> "RunSection":
        if self.timeline is not None:
            if len(self.timeline) != 2 or not 1 <= self.timeline[0] <= self.timeline[1]:
                raise ValueError(f"timeline is {self.timeline}: give [first, last], as in [101, 103]")
            if self.timeline[1] - self.timeline[0] >= MAX_TIMELINE_STEPS:
                raise ValueError(f"timeline is {self.timeline}: a picture shows at most {MAX_TIMELINE_STEPS} steps")
        return self


class EntryLossSection(Section):
    """Weights of the loss's terms in a curriculum entry; those that are None are as in `loss`."""

    kd_weight: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    """Weight of the divergence."""
    ce_weight: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    """Weight of the cross-entropy of the label."""
    z_loss: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    """Weight of (log Z)² of the student."""


class CurriculumEntry(Section):
    """A span of the run: the mixture that it reads, and the shape of its steps."""

    tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """Length in tokens; the last entry has none and lasts to the end of the run. Rounded up to whole steps where the
    next entry's steps have another shape (one of the keys below)."""
    weights: dict[str, Share] = Field(min_length=1)
    """Source -> share of the sequences, in any unit: {web: 0.8, code: 0.2} or {web: 4, code: 1}."""
    sequence_length: int | None = Field(default=None, ge=1, le=MAX_SEQUENCE)
    """Tokens of a sequence, those of the entry's sources, which are tokenized for it. None: whatever they have."""
    global_batch: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES)
    """Sequences of an optimizer step. None: `train.global_batch`."""
    micro_batch: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES)
    """Sequences of one forward pass on one rank. None: `train.micro_batch`."""
    rope: Annotated[float, Field(ge=1, le=MAX_ROPE_THETA)] | dict[str, Any] | None = None
    """The student's rotary embeddings: rope_theta, or `rope_parameters` as in a Hugging Face config. None: those of its
    config. The teacher keeps its own."""
    loss: EntryLossSection | None = None
    """Weights of the loss's terms. None: those of `loss`."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> "CurriculumEntry":
        for name, weight in self.weights.items():
            if weight <= 0:
                raise ValueError(f"the weight of {name} is {weight}: give a positive one, or leave the source out")
        return self


class DataSection(Section):
    manifest: str | None = None
    """manifest.json of the training split, as `megadistill tokenize` wrote it: a path, or a URL that fsspec knows."""
    sources: dict[str, str] = {}
    """Sources of a mixture, in place of `manifest`: name -> manifest.json of a split."""
    curriculum: list[CurriculumEntry] = []
    """Weights of a mixture, one entry after the other. Entries that lie in the future may be edited."""
    seed: int = Field(default=1, ge=0, le=MAX_SEED)
    """Seed of the order of the stream."""
    document_mask: bool = False
    """No token attends to another document, and positions restart at each document."""
    insert_bos: bool = False
    """Put the tokenizer's BOS in front of stored sequences that do not begin with it. `megadistill tokenize` does so
    when it packs; for shards of an earlier release or of another program."""
    on_corrupt_sample: Literal["fail", "mask"] = "fail"
    """A sequence that fails its checksum: end the run, or replace it by masked tokens, recorded in the checkpoint."""
    max_masked_per_million: int = Field(default=100, ge=0, le=1_000_000)
    """mask: more corrupt sequences than this in any million end the run all the same."""
    skip: list[list[SequenceNumber]] = []
    """Ranges [first, stop) of sequence numbers to skip, such as those of a loss spike; they must lie ahead."""
    prefetch: int = Field(default=2, ge=0, le=MAX_BATCHES)
    """Batches that a thread reads ahead of the step; 0: none."""

    @model_validator(mode="after")
    def _manifest_or_mixture(self) -> "DataSection":
        if (self.manifest is None) == (not self.sources):
            raise ValueError("give either manifest, or sources and curriculum")
        if bool(self.sources) != bool(self.curriculum):
            raise ValueError(
                "sources and curriculum go together: the curriculum gives the weights by which the sources are read"
            )
        for number, entry in enumerate(self.curriculum, 1):
            for name in entry.weights:
                if name not in self.sources:
                    raise ValueError(
                        f"curriculum entry {number} weighs {name}, no such source{nearest(name, self.sources)}"
                    )
            if (entry.tokens is None) != (number == len(self.curriculum)):
                last = number == len(self.curriculum)
                what = (
                    "the last curriculum entry has no end: remove its" if last else f"curriculum entry {number} needs"
                )
                raise ValueError(f"{what} tokens (train.steps or train.tokens ends the run)")
        for skipped in self.skip:
            if len(skipped) != 2 or not 0 <= skipped[0] < skipped[1]:
                raise ValueError(f"skip has {skipped}: a range is [first, one behind the last]")
        return self


class DistributedSection(Section):
    shard: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """Ranks over which ZeRO-3 shards a copy of the student. The student's ranks hold as many copies (replicas) as that
    fits into them, whose gradients are added up before each optimizer step. None: all of them share one."""
    min_replicas: int = Field(default=1, ge=1, le=MAX_RANKS)
    """The fewest replicas with which a run continues whose replicas are launches of their own: with fewer it stops for
    a restart."""
    vocab_group: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """Ranks that share the vocabulary and hold one teacher stage each; by default the ranks of a node, over `sequence`
    where that divides them."""
    sequence: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share each sequence (sequence parallelism): each has 1/n of its tokens, and in attention 1/n of the
    heads over all tokens. They have the same place in consecutive vocab groups. 1: a rank has whole sequences."""
    timeout_minutes: float = Field(default=10.0, gt=0, le=MAX_MINUTES)
    """Timeout of a collective, of start-up and of a save (minutes)."""


class StudentSection(Section):
    config: dict[str, Any] | str
    """A Hugging Face config (inline, with model_type) or a folder that holds config.json."""
    weights: str | None = None
    """A Hugging Face folder with the initial weights, such as a pruned teacher's. None: random, by `run.seed`."""
    deepspeed: str | None = Field(default=None, min_length=1)
    """DeepSpeed JSON file: sharding, buckets, offload, communication. A bare name (`zero3`, `hpz`, `cpu` …) is a file
    that comes with the package, anything else a path. None: `zero3` on GPUs, `cpu` on a CPU."""
    vocab_multiple: int = Field(default=1024, ge=1, le=MAX_MULTIPLE)
    """The vocabulary is padded to a multiple of this, and on to one of the ranks of a replica, so that every rank's
    ZeRO-3 partition is whole rows. A run may resume with another."""
    activation_checkpointing: Checkpointing = "none"
    """Parts of each layer that the backward pass recomputes, for less memory. none: nothing. selective: all but matrix
    products and attention, whose outputs are kept. full: the layer, from its input: a third more compute."""
    activation_offload: bool = False
    """Keep the inputs of the layers in host memory between the passes; with activation_checkpointing full, whose
    backward pass needs nothing else. For sequences whose layer inputs do not fit on the device."""
    attention: AttentionSetting = "auto"
    """Implementation of the student's attention. auto: the fastest that computes all of it (softcap, windows,
    documents) without scores [S, S] in memory. eager: with them. sdpa: torch's, with a dense mask where it needs one.
    flex: torch's flex_attention, on a CPU blockwise. flash: the package flash-attn, in 16 bits on an accelerator."""
    compile: CompileSetting = "auto"
    """Compile the student's layers with torch.compile, once for all layers of a kind. auto: on an accelerator with
    Triton. true needs Triton there and a C++ compiler on a CPU, where it takes about a minute."""

    @model_validator(mode="after")
    def _offloads_inputs_alone(self) -> "StudentSection":
        if self.activation_offload and self.activation_checkpointing != "full":
            raise ValueError(
                f"activation_offload keeps the inputs of layers on the host, and with activation_checkpointing "
                f"{self.activation_checkpointing} the backward pass needs more: set activation_checkpointing to full"
            )
        return self


class TeacherSection(Section):
    source: Literal["live", "stored"] = "live"
    """live: the teacher's forward pass runs with the student's. stored: its targets are read from `targets`."""
    path: str | None = None
    """A Hugging Face folder: config.json, safetensors, tokenizer. stored: optional, to verify the targets' origin."""
    local_copy: str | None = None
    """live: a folder on each node's own disk, to which its first rank copies the weights once; the node's ranks read
    them there, verified by sha256, at every start. None: one rank of each stage reads `path`, the others receive it."""
    targets: str | None = None
    """stored: a folder, or a URL, of targets that `megadistill store-targets` or `save_targets` wrote."""
    save_targets: str | None = None
    """live, with loss.targets: a folder in which the run stores its targets."""
    vocab_map: str | None = None
    """A JSON file: list with the teacher's id of each student id, -1 if it has none. None: the same ids."""
    placement: Literal["colocated", "disaggregated"] = "colocated"
    """The teacher's stages run on the student's ranks, or on ranks of their own, the last of the launch."""
    ranks: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """disaggregated: number of the teacher's ranks."""
    stages: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """disaggregated: stages (ranks) of one pipeline; `ranks` may hold several pipelines. None: `ranks`."""
    queue: int = Field(default=4, ge=1, le=MAX_BATCHES)
    """disaggregated: outstanding requests (micro-batches) of each of the student's ranks."""
    transfer_dtype: Literal["native", "float8"] = "native"
    """disaggregated: type of transferred hidden states: the run's precision, or float8 with a scale per token."""
    attention: AttentionSetting = "auto"
    """Implementation of the teacher's attention: see `student.attention`."""
    compile: CompileSetting = "auto"
    """Compile the teacher's layers with torch.compile: see `student.compile`."""
    precision: TeacherPrecision = "native"
    """Matrix products of the teacher's layers. native: the run's precision. float8: e4m3, weights with a scale a row,
    activations with a scale a token; half the memory of bfloat16. stored: that of the teacher of the targets."""
    float8_max_kl: float = Field(default=0.1, gt=0, le=MAX_KL)
    """precision float8: the run is refused if the KL (nats a token) of the float8 teacher to the native one is above it
    on the first tokens of the data."""

    @property
    def is_live(self) -> bool:
        """Whether the model in `path` runs during the training; any other source needs no model."""
        return self.source == "live"

    @property
    def origin(self) -> str:
        """Origin of the targets, for a model card."""
        origins = {"live": "computed in the run", "stored": "stored before the run"}
        return origins.get(self.source, f"of a teacher of kind {self.source}")

    @model_validator(mode="after")
    def _keys_of_the_source(self) -> "TeacherSection":
        if self.is_live:
            if self.path is None:
                raise ValueError("path is required: the teacher's Hugging Face folder")
            if self.targets is not None:
                raise ValueError("targets belongs to source stored: remove it, or set the source")
            return self
        if self.source == "stored" and self.targets is None:
            raise ValueError("source stored needs targets: a folder of stored targets")
        if self.placement != "colocated" or self.save_targets is not None or self.local_copy is not None:
            raise ValueError(f"source {self.source} runs no model: remove placement, save_targets and local_copy")
        return self

    @model_validator(mode="after")
    def _keys_of_the_placement(self) -> "TeacherSection":
        defaults = {"ranks": None, "stages": None, "queue": 4, "transfer_dtype": "native"}
        changed = [name for name, value in defaults.items() if getattr(self, name) != value]
        if self.placement == "colocated" and changed:
            raise ValueError(f"{changed[0]} belongs to placement disaggregated: remove it, or set the placement")
        if self.placement == "disaggregated" and self.ranks is None:
            raise ValueError("placement disaggregated needs ranks: the number of the teacher's processes")
        return self


class NamedTeacherSection(TeacherSection):
    """One of several teachers."""

    sources: list[str] | None = None
    """Sources of the data that it teaches. None: those that no teacher names."""
    weight: float = Field(default=1.0, gt=0, le=MAX_WEIGHT)
    """Weight of its divergence where a source has several teachers, relative to those of the others."""


def default_warmup(steps: int, *, decay_steps: Any = None) -> int:
    """Steps of the learning rate's warm-up in a run of `steps` steps whose recipe gives none."""
    longest = steps - decay_steps if isinstance(decay_steps, int) else steps
    return max(0, min(int(WARMUP_FRACTION * min(steps, MAX_STEPS)), MAX_WARMUP_STEPS, longest))


def default_warmup_tokens(tokens: int, *, decay_tokens: Any = None) -> int:
    """`default_warmup` in tokens, of a run of `tokens` tokens."""
    longest = tokens - decay_tokens if isinstance(decay_tokens, int) else tokens
    return max(0, min(int(WARMUP_FRACTION * min(tokens, MAX_TOKENS)), MAX_WARMUP_TOKENS, longest))


def _with_default(values: dict[str, Any], key: str, default: int) -> dict[str, Any]:
    return values if values.get(key) is not None else {**values, key: default}


class ScheduleSection(Section):
    """Schedule over the run of the learning rate, or of the divergence's weight."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine, or warmup-stable-decay: constant, then linear down over the last `decay_steps`."""
    warmup_steps: int | None = Field(default=None, ge=0, le=MAX_STEPS)
    """Steps of the linear rise from 0 to the peak. None: of the learning rate, 5 % of `train.steps`, at most 2000 (what
    a run folder already has is kept); of the divergence's weight, 0."""
    decay_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """wsd: steps of the final decay."""
    warmup_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    """Tokens of that rise, with `train.tokens`. None: of the learning rate, 5 % of `train.tokens`, at most 8
    billion; of the divergence's weight, 0."""
    decay_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """wsd: tokens of the final decay, with `train.tokens`."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last value, as a fraction of the peak."""

    @property
    def warmup(self) -> int:
        """Length of the rise, in the schedule's unit: steps, or tokens with `train.tokens`."""
        return self.warmup_steps or self.warmup_tokens or 0

    @property
    def decay(self) -> int | None:
        """Length of the final decay in the same unit; None for a cosine."""
        return self.decay_tokens if self.decay_steps is None else self.decay_steps

    def require_fit(self, length: int, key: str, *, unit: Literal["steps", "tokens"] = "steps") -> None:
        """Refuses a schedule longer than a run of `length` steps or tokens. `key` is its name in the recipe.

        Raises:
            ValueError: one line.
        """
        other = "tokens" if unit == "steps" else "steps"
        for name in ("warmup", "decay"):
            if getattr(self, f"{name}_{other}") is not None:
                raise ValueError(
                    f"{key}.{name}_{other} belongs to train.{other}, and this run is measured in {unit}: give "
                    f"{key}.{name}_{unit}"
                )
        if self.kind == "wsd" and self.decay is None:
            raise ValueError(f"{key}.kind wsd needs {key}.decay_{unit} (a tenth of train.{unit} is common)")
        if self.kind == "cosine" and self.decay is not None:
            raise ValueError(
                f"{key}.decay_{unit} belongs to {key}.kind wsd, and cosine decays over all of train.{unit}: "
                "remove it, or set the kind to wsd"
            )
        if self.warmup + (self.decay or 0) > length:
            raise ValueError(
                f"{key}.warmup_{unit} {self.warmup} + decay_{unit} {self.decay or 0} "
                f"do not fit into {unit} {length}; shorten them or train longer"
            )


class TargetsSection(Section):
    """Sparse targets: the part of the teacher's distribution that the student learns from."""

    select: Literal["sampled", "sampled_distinct", "top_k", "threshold", "top_p"] = "sampled"
    """Draws from the teacher's distribution; draws without replacement, renormalised (Gemma 3, 2503.19786; biased); its
    k most likely ids; those above a probability; or a nucleus."""
    draws: int | None = Field(default=None, ge=1, le=MAX_IDS)
    """sampled: independent draws per token; the target is counts/draws. Default 50."""
    k: int | None = Field(default=None, ge=1, le=MAX_IDS)
    """top_k: number of ids. sampled_distinct: different ids that are drawn, default 256."""
    epsilon: float | None = Field(default=None, gt=0, lt=1)
    """threshold: lowest probability of a selected id."""
    p: float | None = Field(default=None, gt=0, lt=1)
    """top_p: total probability of the selected ids."""
    max_ids: int | None = Field(default=None, ge=1, le=MAX_IDS)
    """top_p: maximum number of ids."""
    tail: Literal["other", "renormalised", "dropped"] | None = None
    """Treatment of the remaining probability, default "other". Sampled ids leave none, so they have no tail."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Fills in the defaults of `select`, so that a run's recipe.json has them."""
        if not isinstance(values, dict):
            return values
        defaults = {"sampled": {"draws": 50}, "sampled_distinct": {"k": 256}}
        select = values.get("select", "sampled")
        return (defaults.get(select, {"tail": "other"}) if isinstance(select, str) else {}) | values

    @model_validator(mode="after")
    def _keys_belong(self) -> "TargetsSection":
        owners = {
            "draws": ("sampled",),
            "k": ("top_k", "sampled_distinct"),
            "epsilon": ("threshold",),
            "p": ("top_p",),
            "max_ids": ("top_p",),
        }
        for key, selections in owners.items():
            value = getattr(self, key)
            if value is None and self.select in selections:
                raise ValueError(f"select {self.select} needs {key}")
            if value is not None and self.select not in selections:
                owner = " or ".join(selections)
                raise ValueError(f"{key} is {value}, but it belongs to select {owner}, not {self.select}")
        if self.is_random and self.tail is not None:
            raise ValueError(f"tail is {self.tail}, but targets of sampled ids add up to 1 and leave none: remove it")
        if not self.is_random and self.tail is None:
            raise ValueError(f"select {self.select} needs a tail: other, renormalised or dropped")
        return self

    @property
    def is_random(self) -> bool:
        """Whether the ids are drawn, by the run's seed."""
        return self.select in ("sampled", "sampled_distinct")

    def max_ids_per_token(self, vocab_size: int) -> int:
        """The most ids that a token can have, of a vocabulary of `vocab_size` ids."""
        if self.epsilon is not None:
            return min(math.floor(1 / self.epsilon) + 1, vocab_size)  # a quotient is rounded
        return min(next(number for number in (self.draws, self.k, self.max_ids) if number is not None), vocab_size)


def _describe_parameter(name: str) -> str:
    return "; ".join(f"{kind}: {parameter.description}" for kind, parameter in parameter_owners(name).items()) + "."


class LossSection(Section):
    divergence: DivergenceKind = Field(default=DivergenceKind.FORWARD_KL, strict=False)
    """Between the teacher's distribution p and the student's q; forward_kl is KL(p ‖ q)."""
    beta: float | None = Field(default=None, ge=0, le=1, description=_describe_parameter("beta"))
    alpha: float | None = Field(default=None, ge=0, lt=1, description=_describe_parameter("alpha"))
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    """Both models' logits are divided by it in the divergence; the label's cross-entropy stays at 1."""
    temperature_squared: bool = False
    """Multiply the divergence by T²: keeps its gradient's size when T grows (Hinton et al., 2015)."""
    kd_weight: float = Field(default=1.0, ge=0, le=MAX_WEIGHT)
    """Weight of the divergence."""
    ce_weight: float = Field(default=0.0, ge=0, le=MAX_WEIGHT)
    """Weight of the cross-entropy of the label."""
    z_loss: float = Field(default=0.0, ge=0, le=MAX_WEIGHT)
    """Weight of (log Z)² of the student: keeps logits from drifting; 1e-4 is common."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    """Weight of the load-balancing loss of a student with experts, over the tokens of a step's global batch; 0: none.
    None: `router_aux_loss_coef` of the student's config."""
    router_z_loss_coef: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    """Weight of the z-loss of a student's routers, the mean of (log Z)² of their logits; 0: none. None:
    `router_z_loss_coef` of the student's config, 0 where it has none."""
    label_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the tokens, those of lowest teacher entropy in a vocab group's micro-batch, that learn from the label
    instead (Goyal et al., 2509.01649)."""
    schedule: ScheduleSection | None = None
    """Schedule of the divergence's weight, as a fraction of `kd_weight` (Peng et al., 2410.16215); the remaining weight
    goes to the label's cross-entropy. None: constant."""
    targets: TargetsSection | None = None
    """Learn from a part of the teacher's distribution, selected anew at every step. None: from all of it."""
    logit_memory_mb: int = Field(default=512, ge=1, le=MAX_MEGABYTES)
    """Limit of the logits in memory on a rank (MiB): the loss processes tokens in chunks that fit."""
    elementwise: Literal["auto", "eager", "compiled"] = "auto"
    """Implementation of the elementwise arithmetic: torch operations, or kernels from `torch.compile`. auto: compiled
    on an accelerator with Triton, else eager."""
    diagnostics_every: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps between extra diagnostics of teacher and student, which cost a second pass; 0: never. With `targets` or a
    temperature other than 1, only these steps have the KL of the complete distributions. Not with stored targets."""

    @property
    def parameter(self) -> float | None:
        """The divergence's parameter, whatever its name; None: its default."""
        return self.alpha if self.beta is None else self.beta

    @field_validator("beta", "alpha")
    @classmethod
    def _parameter_fits(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and "divergence" in info.data:  # not there where it is wrong itself
            require_parameter(info.data["divergence"], str(info.field_name), value)
        return value

    @model_validator(mode="after")
    def _terms_fit(self) -> "LossSection":
        if self.targets is not None:
            if self.divergence is not DivergenceKind.FORWARD_KL:
                raise ValueError(
                    f"targets hold a part of the teacher's distribution, but {self.divergence} needs all of it"
                )
            if self.label_fraction != 0:
                raise ValueError("label_fraction needs the teacher's entropy, which targets do not hold: set it to 0")
        return self


class OptimizerSection(Section):
    """Keys of every optimizer. A member of `OptimizerUnion` adds its own, and its `kind`."""

    kind: str
    """Name of the optimizer."""
    learning_rate: float = Field(gt=0, le=MAX_RATE)
    """Peak of the schedule."""
    weight_decay: float = Field(default=0.1, ge=0, le=MAX_RATE)
    """Decoupled weight decay, of matrices only: norms and biases have none."""


class AdamWSection(OptimizerSection):
    kind: Literal["adamw"] = "adamw"
    """Name of the optimizer."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment, the running mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the second moment, the running mean of the squared gradient."""
    epsilon: float = Field(default=1e-8, ge=MIN_EPSILON, le=1)
    """Added to the root of the second moment."""


def _default_optimizer(values: Any) -> Any:
    return {"kind": "adamw", **values} if isinstance(values, dict) else values


OptimizerUnion = Annotated[AdamWSection, Field(discriminator="kind"), BeforeValidator(_default_optimizer)]
"""The sections of `train.optimizer`, distinguished by `kind`; `student.optimizer` has an entry for each."""


class TrainSection(Section):
    tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """Tokens of the whole run, in place of `steps`; the last step is whole. Schedules then count tokens."""
    steps: int = Field(default=None, ge=1, le=MAX_STEPS, validate_default=True)
    """Optimizer steps of the whole run. null: those that `tokens` makes, which a run's recipe.json has."""
    global_batch: int = Field(ge=1, le=MAX_SEQUENCES)
    """Sequences of an optimizer step, over all ranks, for any world size."""
    micro_batch: int = Field(ge=1, le=MAX_SEQUENCES)
    """Sequences of one forward pass on one rank; accumulation follows from it. Where the global batch does not divide
    into the ranks' micro-batches, the rows that are left over are computed and count for nothing."""
    precision: Precision = "bfloat16"
    """Compute type of both models. Master weights, optimizer state and accumulated gradients are always float32."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=MAX_RATE)
    """Maximum global gradient norm; 0: no clipping."""
    optimizer: OptimizerUnion
    schedule: ScheduleSection = ScheduleSection()
    checkpoint_every: int = Field(default=1000, ge=1, le=MAX_STEPS)
    """Steps between checkpoints; the last step always has one, and the last before a `wsd` schedule decays."""
    log_every: int = Field(default=10, ge=1, le=MAX_STEPS)
    """Steps between lines on the terminal; metrics.jsonl and TensorBoard get every step."""
    histograms_every: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps between TensorBoard histograms of all weights and of their mean gradients; 0: never."""
    norms_every: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps between norms of gradient, update and weights by layer and by kind of module; 0: never."""

    @field_validator("steps", mode="wrap")
    @classmethod
    def _steps_or_tokens(cls, steps: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """0 until the data is read: see `train.setup.step_shape.with_steps`."""
        if steps is not None:
            return handler(steps)
        if info.data.get("tokens", 1) is None:  # 1: where tokens is wrong itself
            raise PydanticKnownError("missing")
        return 0

    @property
    def unit(self) -> Literal["steps", "tokens"]:
        """Unit of the schedules."""
        return "steps" if self.tokens is None else "tokens"

    @property
    def length(self) -> int:
        """Length of the run and of its schedules, in steps or in tokens (`unit`)."""
        return self.steps if self.tokens is None else self.tokens

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainSection":
        self.schedule.require_fit(self.length, "schedule", unit=self.unit)
        return self


Tracker: TypeAlias = Literal["tensorboard", "wandb", "mlflow"]

EXTERNAL_TRACKERS: tuple[Tracker, ...] = ("wandb", "mlflow")
"""Trackers that are packages of their own, and that a process beside the run sends to."""


class ProfileSection(Section):
    """Traces of torch.profiler, in RUN/profile/."""

    steps: list[Step]
    """[first, last]: steps whose operators are recorded."""
    ranks: list[Annotated[int, Field(ge=0, lt=MAX_RANKS)]] = Field(default=[0], min_length=1, max_length=64)
    """Ranks of the student that record."""
    memory_snapshot: bool = False
    """Write a snapshot of the accelerator's allocator too, with the stack of each allocation, for
    pytorch.org/memory_viz. Only with CUDA."""

    @model_validator(mode="after")
    def _steps_are_a_range(self) -> "ProfileSection":
        if len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps is {self.steps}: give [first, last], as in [101, 103]")
        if self.steps[1] - self.steps[0] >= MAX_PROFILE_STEPS:
            raise ValueError(
                f"steps is {self.steps}: a trace of more than {MAX_PROFILE_STEPS} steps is too large to be opened: "
                "give fewer; the next start of the run may profile others"
            )
        return self


class LocalCheckpointSection(Section):
    """Saves on the nodes' own disks or memory, from which a restart on these nodes, or all but one, resumes."""

    every: int = Field(ge=1, le=MAX_STEPS)
    """Steps between them, fewer than `train.checkpoint_every`. One that falls due during another save follows it."""
    folder: str = Field(min_length=1)
    """A folder that each node has for itself, such as /dev/shm/megadistill or one on a local disk. The last two saves
    stay in it, with those of the node before, until the run is complete; those of other runs are not touched."""

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, folder: str) -> str:
        if not folder.startswith("/") or "\0" in folder:
            raise ValueError("name the folder from the root, as /dev/shm/megadistill: every node has its own")
        return folder


class CheckpointSection(Section):
    keep_last: int = Field(default=3, ge=1, le=MAX_STEPS)
    """Number of latest checkpoints to keep. None is deleted before a newer one is complete, and never that of the last
    step before a `wsd` schedule decays."""
    keep_every: int | None = Field(default=None, ge=0, le=MILESTONE_CHECKPOINTS * MAX_STEPS)
    """Checkpoints of steps divisible by this are never deleted; 0: none. None: 10 times `train.checkpoint_every`."""
    asynchronous: bool = True
    """Copy the state to host memory and write it during the next steps; false: the run waits for the disk."""
    local: LocalCheckpointSection | None = None
    """A second tier, saved more often; null: durable checkpoints alone."""


class ResilienceSection(Section):
    """Detection of faults, and the reactions to them."""

    max_skipped_steps: int = Field(default=3, ge=0, le=MAX_STEPS)
    """Consecutive steps that may be skipped because a loss or gradient is not finite; one more ends the run."""
    spike_zscore: float = Field(default=10.0, gt=0, le=MAX_ZSCORE)
    """A loss this many robust standard deviations above the median of the last `spike_window` steps is a spike."""
    spike_window: int = Field(default=128, ge=8, le=MAX_WINDOW)
    """Steps in the reference window of `spike_zscore` and `teacher_zscore`."""
    max_rollbacks: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Maximum number of rollbacks to a checkpoint before a spike, which skip its sequences; 0: spikes are reported."""
    rollback_steps: int = Field(default=16, ge=1, le=MAX_STEPS)
    """Steps whose sequences a rollback skips; the step of the spike is the last."""
    teacher_zscore: float = Field(default=10.0, gt=0, le=MAX_ZSCORE)
    """Threshold as `spike_zscore`, in either direction, of the teacher's cross-entropy; reported."""
    teacher_hash_every: int = Field(default=1000, ge=0, le=MAX_STEPS)
    """Steps between comparisons of the teacher's weights with the loaded ones; 0: never."""
    recompute_every: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps between micro-batches that are computed twice and compared bitwise; 0: never."""
    straggler_every: int = Field(default=100, ge=0, le=MAX_STEPS)
    """Steps between comparisons of the ranks' compute speed; 0: never."""
    step_timeout_seconds: float = Field(default=600.0, gt=0, le=MAX_SECONDS)
    """Time limit of a step (s). A longer one is a hang: every rank writes its stacks, and the run ends (exit 3)."""


class ValidationSection(Section):
    """Measures on held-out splits during the run: at its start, every `every` steps, and at its end."""

    every: int = Field(ge=1, le=MAX_STEPS)
    """Optimizer steps between validations."""
    data: dict[str, str] = Field(min_length=1, max_length=MAX_HELD_OUT_SPLITS)
    """Held-out splits: name -> manifest.json, as `megadistill tokenize` wrote it; of the run's tokenizer and sequence
    length."""
    sequences: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES)
    """Sequences of each split at most, the first of its order in every validation; null: all."""
    patience: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Validations in a row without a lower cross-entropy over all splits that are reported, once (event
    `validation_plateau`); null: none."""
    stop: bool = False
    """Save and stop when the patience is used up."""

    @model_validator(mode="after")
    def _is_complete(self) -> "ValidationSection":
        for name in self.data:
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or name == "all":
                raise ValueError(
                    f"data has a split {name!r}: name splits with letters, digits, '_', '-' and '.', 64 at most, and "
                    "not all, which is the name of all of them together"
                )
        if self.stop and self.patience is None:
            raise ValueError(
                "stop is true without a patience, so nothing would stop the run: set patience, or remove it"
            )
        return self


class Recipe(Section):
    """A complete recipe: all settings of a run."""

    objective: Literal["labels", "distill"]
    """labels: next-token training. distill: training on a teacher's distribution of every token."""
    run: RunSection
    data: DataSection
    student: StudentSection
    train: TrainSection
    distributed: DistributedSection = DistributedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resilience: ResilienceSection = ResilienceSection()
    loss: LossSection = LossSection()
    teacher: TeacherSection | None = None
    """The teacher, for objective distill only."""
    teachers: dict[str, NamedTeacherSection] = Field(default={}, max_length=MAX_TEACHERS)
    """Several teachers in place of `teacher`, by name: each teaches some sources of the data, or all learn from a
    mixture of them."""
    validation: ValidationSection | None = None
    """Validation on held-out splits; null: none."""
    track: list[Tracker] = ["tensorboard"]
    """Trackers that get the metrics; metrics.jsonl has them in any case. wandb and mlflow are sent to by a process of
    their own, and take project, server and key from their own environment variables (docs/trackers.md)."""
    profile: ProfileSection | None = None
    """Record some steps with torch.profiler. None: none."""

    @field_validator("track")
    @classmethod
    def _trackers_are_distinct(cls, track: list[Tracker]) -> list[Tracker]:
        if len({*track}) < len(track):
            raise ValueError(f"track is {track}: name each tracker once")
        return track

    @model_validator(mode="before")
    @classmethod
    def _derived_defaults(cls, values: Any) -> Any:
        """Fills in the numbers that follow from other keys, so that a run's recipe.json has them."""
        train = values.get("train") if isinstance(values, dict) else None
        if not isinstance(train, dict):
            return values
        schedule = train.get("schedule", {})
        if train.get("tokens") is not None and train.get("steps") == 0:  # not resolved yet
            train = {key: value for key, value in train.items() if key != "steps"}
        if isinstance(schedule, dict) and isinstance(train.get("tokens"), int):
            warmup_tokens = default_warmup_tokens(train["tokens"], decay_tokens=schedule.get("decay_tokens"))
            train = {**train, "schedule": _with_default(schedule, "warmup_tokens", warmup_tokens)}
        elif isinstance(schedule, dict) and isinstance(train.get("steps"), int):
            warmup_steps = default_warmup(train["steps"], decay_steps=schedule.get("decay_steps"))
            train = {**train, "schedule": _with_default(schedule, "warmup_steps", warmup_steps)}
        values = {**values, "train": train}
        loss, checkpoint = values.get("loss"), values.get("checkpoint", {})
        if isinstance(loss, dict) and isinstance(loss.get("schedule"), dict):
            key = "warmup_steps" if train.get("tokens") is None else "warmup_tokens"
            values["loss"] = {**loss, "schedule": _with_default(loss["schedule"], key, 0)}
        every = train.get("checkpoint_every", TrainSection.model_fields["checkpoint_every"].default)
        if isinstance(checkpoint, dict) and isinstance(every, int):
            values["checkpoint"] = _with_default(checkpoint, "keep_every", MILESTONE_CHECKPOINTS * every)
        return values

    @model_validator(mode="after")
    def _local_saves_are_more_frequent(self) -> "Recipe":
        local, every = self.checkpoint.local, self.train.checkpoint_every
        if local is not None and local.every >= every:
            raise ValueError(
                f"checkpoint.local.every is {local.every}, but durable checkpoints are written every {every} steps "
                "(train.checkpoint_every): give it fewer steps, or set checkpoint.local to null"
            )
        return self

    @model_validator(mode="after")
    def _teachers_fit(self) -> "Recipe":
        if self.teachers and self.teacher is not None:
            raise ValueError("teacher and teachers exclude each other: name every teacher in teachers, or keep one")
        if self.objective == "distill" and not self.teacher_sections:
            raise ValueError("objective distill needs teacher.path; to train from labels, set objective to labels")
        if self.objective == "labels" and self.teacher_sections:
            key = "teacher to null" if self.teacher is not None else "teachers to {}"
            raise ValueError(f"objective labels uses no teacher: set {key}, or objective to distill")
        for key, section in self.teacher_sections.items():
            if section.source == "stored" and self.loss.targets is None:
                raise ValueError(f"{key}.source stored needs loss.targets: the selection that was stored")
            if section.save_targets is not None and self.loss.targets is None:
                raise ValueError(f"{key}.save_targets needs loss.targets: the selection to store")
            if section.source == "stored" and self.loss.diagnostics_every != 0:
                raise ValueError(
                    f"loss.diagnostics_every is {self.loss.diagnostics_every}, but diagnostics need the teacher's "
                    f"complete distribution, which {key}.source stored does not have: set it to 0"
                )
        return self

    @model_validator(mode="after")
    def _sources_have_teachers(self) -> "Recipe":
        if not self.teachers:
            return self
        known = self.data.sources or {WHOLE_DATA: ""}
        for name, section in self.teachers.items():
            if section.placement == "disaggregated":
                raise ValueError(
                    f"teachers.{name}.placement disaggregated gives ranks to the pipelines of a single teacher: set it "
                    "to colocated"
                )
            if section.save_targets is not None:
                raise ValueError(
                    f"teachers.{name}.save_targets stores the targets of every row, of which one of several teachers "
                    "has some: store them with that teacher alone (megadistill store-targets)"
                )
        for name, section in self.teachers.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
                raise ValueError(f"teachers: {name!r} is no name: use up to 64 letters, digits, - and _")
            for source in section.sources or []:
                if source not in known:
                    way_out = nearest(source, known) if self.data.sources else "; data.manifest has no names, remove it"
                    raise ValueError(f"teachers.{name}.sources has {source}, no such source of the data{way_out}")
            if not any(name in self.teachers_of(source) for source in known):
                raise ValueError(
                    f"teachers.{name} teaches no source: the other teachers name all of them in sources: give it "
                    "some too, or remove it"
                )
        for source in known:
            if not self.teachers_of(source):
                raise ValueError(
                    f"data.sources.{source} has no teacher: add it to the sources of one, or leave out the sources of "
                    "a teacher, which then has the rest"
                )
        if self.distributed.sequence > 1:
            raise ValueError(
                f"distributed.sequence is {self.distributed.sequence}, but the ranks of several teachers have whole "
                "sequences: set it to 1, or use one teacher"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> "Recipe":
        if self.objective == "distill" and self.loss.kd_weight == 0:
            raise ValueError("objective distill with loss.kd_weight 0 ignores the teacher: set objective to labels")
        if self.objective == "labels":
            used = ("z_loss", "router_aux_loss_coef", "router_z_loss_coef", "logit_memory_mb", "elementwise")
            defaults = LossSection()
            changed = [
                name
                for name in LossSection.model_fields
                if name not in used and getattr(self.loss, name) != getattr(defaults, name)
            ]
            if changed:
                raise ValueError(
                    f"objective labels does not use loss.{changed[0]}: remove it, or set objective to distill"
                )
        if self.loss.schedule is not None:
            self.loss.schedule.require_fit(self.train.length, "loss.schedule", unit=self.train.unit)
        return self

    @model_validator(mode="after")
    def _entries_fit(self) -> "Recipe":
        for number, entry in enumerate(self.data.curriculum, 1):
            given = {} if entry.loss is None else entry.loss.model_dump(exclude_none=True)
            if self.objective == "labels" and given.keys() - {"z_loss"}:
                raise ValueError(
                    f"objective labels does not use loss.{min(given.keys() - {'z_loss'})} of curriculum entry {number}"
                    ": remove it, or set objective to distill"
                )
        return self

    @property
    def teacher_sections(self) -> dict[str, TeacherSection]:
        """The recipe's teachers by their keys: `teacher`, or `teachers.NAME` of each of several."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{name}": section for name, section in self.teachers.items()}

    def teachers_of(self, source: str) -> dict[str, float]:
        """Those of `teachers` that teach a source, with weights that add up to 1."""
        named = {name: each for name, each in self.teachers.items() if source in (each.sources or ())}
        chosen = named or {name: each for name, each in self.teachers.items() if each.sources is None}
        total = sum(each.weight for each in chosen.values())
        return {name: each.weight / total for name, each in chosen.items()}

    def with_teacher(self, name: str) -> "Recipe":
        """The recipe with one of `teachers` as its `teacher`."""
        return self.model_copy(update={"teacher": self.teachers[name], "teachers": {}})

    @property
    def stable_steps(self) -> int:
        """The steps that would be the same with a larger `train.steps`: those before a `wsd` schedule decays; 0 with a
        cosine. The checkpoint after them is kept: a longer run, or another decay, begins from it."""
        return self.stable_length if self.train.tokens is None else 0

    @property
    def stable_length(self) -> int:
        """`stable_steps` in the unit of the schedules: steps or tokens."""
        schedules = [each for each in (self.train.schedule, self.loss.schedule) if each is not None]
        if any(each.decay is None for each in schedules):
            return 0
        return min(self.train.length - (each.decay or 0) for each in schedules)

    @property
    def has_scheduled_weights(self) -> bool:
        """Whether the weights of the loss's terms change during the run: by a schedule, or by curriculum entries."""
        by_entry = any(entry.loss is not None for entry in self.data.curriculum)
        return self.objective == "distill" and (self.loss.schedule is not None or by_entry)

    @property
    def has_shaped_entries(self) -> bool:
        """Whether a curriculum entry has a sequence length, batch, rotary embeddings or weights of its own."""
        shape = ("sequence_length", "global_batch", "micro_batch", "rope", "loss")
        return any(getattr(entry, name) is not None for entry in self.data.curriculum for name in shape)

    def accumulation(self, world: int, entry: int | None = None) -> int:
        """Micro-batches of a rank for each optimizer step: of `train`, or of a curriculum entry by its index.

        As many as the global batch needs; rows of the ranks past it are surplus (`data.stream.stream`).

        Raises:
            UserError: `world` ranks do not divide into groups that share sequences.
        """
        own = None if entry is None else self.data.curriculum[entry]
        global_batch = (own.global_batch if own is not None else None) or self.train.global_batch
        micro_batch = (own.micro_batch if own is not None else None) or self.train.micro_batch
        n = self.distributed.sequence
        if world % n:
            raise UserError(
                f"distributed.sequence is {n}, but this run has {number_of(world, 'rank')}, not a multiple of {n}: "
                "give a number that divides them, or start it on other ranks"
            )
        return -(-global_batch // (world // n * micro_batch))

    def snapshot(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON values, as in recipe.json: without secrets of URLs."""
        snapshot: dict[str, Any] = redacted(self.model_dump(mode="json"), by=without_url_secrets)
        return snapshot
