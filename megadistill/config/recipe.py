"""The recipe as frozen pydantic models, one section a package. Paths are relative to the current directory."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megadistill.errors import UserError, nearest
from megadistill.precision import Precision

MAX_TIMELINE_STEPS = 100


class Section(BaseModel):
    """A frozen part of the recipe that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(Section):
    folder: str = Field(min_length=1)
    """Where the run writes everything."""
    seed: int = Field(default=1, ge=0)
    """Seed of the student's initialisation."""
    time_limit_minutes: float | None = Field(default=None, gt=0)
    """A time budget: the run saves and stops after the step at which it is spent. None: no limit."""
    timeline: list[int] | None = None
    """[first, last]: steps of which every rank records what it does, for `megadistill timeline`. None: none."""

    @model_validator(mode="after")
    def _timeline_is_a_range(self) -> "RunSection":
        if self.timeline is not None:
            if len(self.timeline) != 2 or not 1 <= self.timeline[0] <= self.timeline[1]:
                raise ValueError(f"timeline is {self.timeline}: give [first, last], as in [101, 103]")
            if self.timeline[1] - self.timeline[0] >= MAX_TIMELINE_STEPS:
                raise ValueError(f"timeline is {self.timeline}: a picture shows {MAX_TIMELINE_STEPS} steps at most")
        return self


class CurriculumEntry(Section):
    """A span of the run and the mixture that it reads."""

    tokens: int | None = Field(default=None, ge=1)
    """Length in tokens; the last entry has none and lasts to the end of the run."""
    weights: dict[str, float] = Field(min_length=1)
    """Source -> share of the sequences, in any unit: {web: 0.8, code: 0.2} or {web: 4, code: 1}."""

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
    """For a mixture, in place of `manifest`: name -> manifest.json of a split."""
    curriculum: list[CurriculumEntry] = []
    """For a mixture: its weights, one entry after the other. Entries that lie in the future may be edited."""
    seed: int = Field(default=1, ge=0)
    """Seed of the order of the stream."""
    document_mask: bool = False
    """Each document is read by itself: no token attends to another document, and positions restart."""
    on_corrupt_sample: Literal["fail", "mask"] = "fail"
    """What a damaged unit does: end the run, or become a masked row in its place, which the state remembers."""
    max_masked_per_million: int = Field(default=100, ge=0)
    """mask: more damaged units than this in any million sequences end the run all the same."""
    skip: list[list[int]] = []
    """Ranges [first, stop) of sequence numbers to leave out, after a loss spike: they must lie ahead."""
    prefetch: int = Field(default=2, ge=0)
    """Batches that a thread reads ahead of the step; 0: none."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> "DataSection":
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
                raise ValueError(f"{what} tokens (train.steps ends the run)")
        for skipped in self.skip:
            if len(skipped) != 2 or not 0 <= skipped[0] < skipped[1]:
                raise ValueError(f"skip has {skipped}: a range is [first, one behind the last]")
        return self


class DistributedSection(Section):
    vocab_group: int | None = Field(default=None, ge=1)
    """Ranks that share the vocabulary and hold one teacher stage each; by default the ranks of a node."""
    timeout_minutes: float = Field(default=10.0, gt=0)
    """How long a collective may wait before the run is given up: start-up and saving are slow."""


class StudentSection(Section):
    config: dict[str, Any] | str
    """A Hugging Face config (inline, with model_type) or a folder that holds config.json."""
    weights: str | None = None
    """A Hugging Face folder whose weights the student starts from, a pruned teacher's say. None: `run.seed` decides."""
    deepspeed: str = "ds_configs/zero3.json"
    """What DeepSpeed alone owns: sharding, buckets, offload, communication."""
    vocab_multiple: int = Field(default=1024, ge=1)
    """The vocabulary is padded to a multiple of this, so that every rank's ZeRO-3 partition is whole rows."""
    activation_checkpointing: bool = False
    """Keep what enters each layer and compute the rest again in the backward pass: a third more work, less memory."""


class TeacherSection(Section):
    source: Literal["live", "stored"] = "live"
    """live: its forward pass runs with the student's. cache: `targets`, which it said once; it is not in memory."""
    path: str | None = None
    """A Hugging Face folder: config.json, safetensors, the tokenizer. For cache, to be sure whose targets they are."""
    targets: str | None = None
    """stored: a folder, or a URL, of targets that `megadistill store-targets` or `save_targets` wrote."""
    save_targets: str | None = None
    """live, with loss.targets: a folder in which the targets are stored as the run makes them."""
    vocab_map: str | None = None
    """A JSON list with the teacher's id for each of the student's ids, -1 where it has none. None: the same ids."""
    placement: Literal["colocated", "disaggregated"] = "colocated"
    """Where the teacher lives: a stage on each of the student's ranks, or on ranks of its own, the launch's last."""
    ranks: int | None = Field(default=None, ge=1)
    """disaggregated: how many of the launch's processes are the teacher's."""
    stages: int | None = Field(default=None, ge=1)
    """disaggregated: ranks of one pipeline; `ranks` may hold several. All of `ranks` where nothing is said."""
    queue: int = Field(default=4, ge=1)
    """disaggregated: micro-batches of each of the student's ranks that are asked for before the oldest is answered."""
    transfer_dtype: Literal["native", "float8"] = "native"
    """disaggregated: how hidden states cross: in the run's precision, or in 8 bits with a scale for each token."""

    @model_validator(mode="after")
    def _keys_of_the_source(self) -> "TeacherSection":
        if self.source == "live":
            if self.path is None:
                raise ValueError("path is required: the teacher's Hugging Face folder")
            if self.targets is not None:
                raise ValueError("targets belongs to source stored: remove it, or set the source")
            return self
        if self.targets is None:
            raise ValueError("source stored needs targets: a folder of stored targets")
        if self.placement != "colocated" or self.save_targets is not None:
            raise ValueError("source stored has no live teacher: remove placement and save_targets")
        return self

    @model_validator(mode="after")
    def _keys_of_the_placement(self) -> "TeacherSection":
        plain = {"ranks": None, "stages": None, "queue": 4, "transfer_dtype": "native"}
        moved = [name for name, value in plain.items() if getattr(self, name) != value]
        if self.placement == "colocated" and moved:
            raise ValueError(f"{moved[0]} belongs to placement disaggregated: remove it, or set the placement")
        if self.placement == "disaggregated" and self.ranks is None:
            raise ValueError("placement disaggregated needs ranks: how many processes are the teacher's")
        return self


class ScheduleSection(Section):
    """How a number changes over the run: the learning rate, or the weight of the divergence."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine, or warmup-stable-decay: constant, then linear down over the last `decay_steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear from 0 to the peak over these."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Length of the final decay; for wsd only."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last value as a share of the peak."""

    def require_fit(self, steps: int, key: str) -> None:
        """Refuses what does not fit into a run of `steps`. `key` is this schedule's name in the recipe.

        Raises:
            ValueError: one line.
        """
        if self.kind == "wsd" and self.decay_steps is None:
            raise ValueError(f"{key}.kind wsd needs {key}.decay_steps (a tenth of train.steps is common)")
        if self.kind == "cosine" and self.decay_steps is not None:
            raise ValueError(f"{key}.decay_steps belongs to {key}.kind wsd; cosine decays over all of train.steps")
        if self.warmup_steps + (self.decay_steps or 0) > steps:
            raise ValueError(
                f"{key}.warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps or 0} "
                f"do not fit into steps {steps}; shorten them or train longer"
            )


class TargetsSection(Section):
    """What is kept of the teacher's distribution, where the student does not learn from all of it."""

    select: Literal["sampled", "top_k", "threshold", "top_p"] = "sampled"
    """Drawn by the teacher's probability, its k most likely ids, those above a probability, or a nucleus."""
    draws: int | None = Field(default=None, ge=1)
    """sampled: independent draws for each token; the target is counts/draws. 50 where nothing is said."""
    k: int | None = Field(default=None, ge=1)
    """top_k: how many of the most likely ids."""
    epsilon: float | None = Field(default=None, gt=0, lt=1)
    """threshold: the lowest probability that is kept."""
    p: float | None = Field(default=None, gt=0, lt=1)
    """top_p: the probability that the most likely ids reach together."""
    max_ids: int | None = Field(default=None, ge=1)
    """top_p: how many of them at most."""
    tail: Literal["other", "renormalised", "dropped"] | None = None
    """What becomes of the rest; "other" where nothing is said. Draws leave none, so `sampled` has no tail."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Filled in here, so that a run's recipe.json says them."""
        if not isinstance(values, dict):
            return values
        sampled = values.get("select", "sampled") == "sampled"
        return {"draws": 50, **values} if sampled else {"tail": "other", **values}

    @model_validator(mode="after")
    def _keys_belong(self) -> "TargetsSection":
        owners = {"draws": "sampled", "k": "top_k", "epsilon": "threshold", "p": "top_p", "max_ids": "top_p"}
        for key, owner in owners.items():
            value = getattr(self, key)
            if value is None and owner == self.select:
                raise ValueError(f"select {self.select} needs {key}")
            if value is not None and owner != self.select:
                raise ValueError(f"{key} is {value}, but it belongs to select {owner}, not {self.select}")
        if self.select == "sampled" and self.tail is not None:
            raise ValueError(f"tail is {self.tail}, but counts of draws add up to 1 and leave none: remove it")
        if self.select != "sampled" and self.tail is None:
            raise ValueError(f"select {self.select} needs a tail: other, renormalised or dropped")
        return self


class LossSection(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"] = "forward_kl"
    """Between the teacher's distribution p and the student's q; forward_kl is KL(p ‖ q)."""
    beta: float | None = Field(default=None, ge=0, le=1)
    """jsd: the teacher's share of the mixture; 0.5 where nothing is said."""
    alpha: float | None = Field(default=None, ge=0, lt=1)
    """skew_kl: the teacher's share of the mixture; 0.1 where nothing is said."""
    temperature: float = Field(default=1.0, gt=0)
    """Both models' logits are divided by it in the divergence; the label's cross-entropy stays at 1."""
    temperature_squared: bool = False
    """Multiply the divergence by T²: keeps its gradient's size when T grows (Hinton et al., 2015)."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the label."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of (log Z)² of the student: keeps logits from drifting; 1e-4 is common."""
    label_fraction: float = Field(default=0.0, ge=0, lt=1)
    """The share of the tokens, where the teacher is surest, that learn from the label instead (Goyal et al.,
    2509.01649). The surest are looked for among the tokens of a vocab group's micro-batch."""
    schedule: ScheduleSection | None = None
    """The divergence's weight over the run, as a share of `kd_weight` (Peng et al., 2410.16215); what it gives up goes
    to the label's cross-entropy. None: constant."""
    targets: TargetsSection | None = None
    """Learn from a part of the teacher's distribution, chosen anew at every step. None: from all of it."""
    logit_memory_mb: int = Field(default=512, ge=1)
    """MiB of logits that exist at one time on a rank: tokens go through the loss in chunks that fit."""
    elementwise: Literal["eager", "compiled"] = "eager"
    """Who does the arithmetic between the products: torch's operations, or kernels that `torch.compile` makes."""
    diagnostics_every: int = Field(default=0, ge=0)
    """Steps between closer looks at teacher and student, at the cost of a second pass; 0: never."""

    @model_validator(mode="after")
    def _terms_fit(self) -> "LossSection":
        for name, owner in (("beta", "jsd"), ("alpha", "skew_kl")):
            value = getattr(self, name)
            if value is not None and self.divergence != owner:
                raise ValueError(f"{name} is {value}, but it belongs to divergence {owner}, not {self.divergence}")
        if self.targets is not None:
            if self.divergence != "forward_kl":
                raise ValueError(f"targets keep a part of the teacher, but {self.divergence} needs all of it")
            for name, reason in (("label_fraction", "entropy"), ("diagnostics_every", "whole distribution")):
                if getattr(self, name) != 0:
                    raise ValueError(f"{name} needs the teacher's {reason}, which targets do not tell: set it to 0")
        return self


class AdamWSection(Section):
    learning_rate: float = Field(gt=0)
    """The peak of the schedule."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean of its square."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled, on matrices only: norms and biases are not decayed."""


class TrainSection(Section):
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1)
    """Sequences of an optimizer step, over all ranks: fixed, whatever the world size."""
    micro_batch: int = Field(ge=1)
    """Sequences of one forward pass on one rank; accumulation follows from it."""
    precision: Precision = "bfloat16"
    """What both models compute in. Master weights, moments and accumulated gradients are float32 in any case."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    optimizer: AdamWSection
    schedule: ScheduleSection = ScheduleSection()
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step of a run always is one."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines on the terminal; metrics.jsonl and TensorBoard get every step."""
    histograms_every: int = Field(default=0, ge=0)
    """Steps between histograms of all weights and of their smoothed gradients, for TensorBoard; 0: never."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainSection":
        self.schedule.require_fit(self.steps, "schedule")
        return self


class CheckpointSection(Section):
    keep_last: int = Field(default=3, ge=1)
    """The newest checkpoints that are kept. Nothing is deleted before a newer one is whole."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that this divides are kept for good; 0: none."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while the run goes on; false: the run waits for the disk."""


class ResilienceSection(Section):
    """What the run takes for a fault, and what it does about it."""

    max_skipped_steps: int = Field(default=3, ge=0)
    """Steps in a row that may be skipped because a loss or a gradient is not finite; one more ends the run."""
    spike_zscore: float = Field(default=10.0, gt=0)
    """A loss this many robust standard deviations above the median of the last `spike_window` steps is a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps whose losses say what is usual, for `spike_zscore` and `teacher_zscore`."""
    max_rollbacks: int = Field(default=0, ge=0)
    """How often a spike may roll the run back to an older checkpoint and skip what it read; 0: it is only reported."""
    rollback_steps: int = Field(default=16, ge=1)
    """A rollback leaves out the sequences of this many steps, the spike's being the last."""
    teacher_zscore: float = Field(default=10.0, gt=0)
    """As `spike_zscore`, in either direction, for the teacher's cross-entropy: reported, with what to look at."""
    teacher_hash_every: int = Field(default=1000, ge=0)
    """Steps between comparisons of the teacher's weights with what was loaded; 0: never."""
    recompute_every: int = Field(default=0, ge=0)
    """Steps between micro-batches that are computed twice and compared to the last bit; 0: never."""
    straggler_every: int = Field(default=100, ge=0)
    """Steps between comparisons of how fast the ranks compute; 0: never."""
    step_timeout_seconds: float = Field(default=600.0, gt=0)
    """A step that takes longer is a hang: every rank writes its stacks, the culprit is named, the run ends (exit 3)."""


class Recipe(Section):
    """Everything that decides a run's numbers."""

    objective: Literal["labels", "distill"]
    """labels: ordinary next-token training. distill: a teacher says what every token should have been."""
    run: RunSection
    data: DataSection
    student: StudentSection
    train: TrainSection
    distributed: DistributedSection = DistributedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resilience: ResilienceSection = ResilienceSection()
    loss: LossSection = LossSection()
    teacher: TeacherSection | None = None
    """For objective distill alone."""

    @model_validator(mode="after")
    def _objective_fits(self) -> "Recipe":
        if self.objective == "distill" and self.teacher is None:
            raise ValueError("objective distill needs teacher.path; to train from labels, set objective to labels")
        if self.objective == "labels" and self.teacher is not None:
            raise ValueError("objective labels reads no teacher: set teacher to null, or objective to distill")
        if self.teacher is not None and self.loss.targets is None:
            if self.teacher.source == "stored":
                raise ValueError("teacher.source stored needs loss.targets: which of the targets were stored")
            if self.teacher.save_targets is not None:
                raise ValueError("teacher.save_targets needs loss.targets: which targets to make and to store")
        if self.objective == "distill" and self.loss.kd_weight == 0:
            raise ValueError("objective distill with loss.kd_weight 0 ignores the teacher: set objective to labels")
        if self.objective == "labels":
            used = ("z_loss", "logit_memory_mb", "elementwise")
            plain = LossSection()
            moved = [
                name
                for name in LossSection.model_fields
                if name not in used and getattr(self.loss, name) != getattr(plain, name)
            ]
            if moved:
                raise ValueError(
                    f"objective labels does not use loss.{moved[0]}: remove it, or set objective to distill"
                )
        if self.loss.schedule is not None:
            self.loss.schedule.require_fit(self.train.steps, "loss.schedule")
        return self

    def accumulation(self, world: int) -> int:
        """Micro-batches a rank runs for each optimizer step.

        Raises:
            UserError: the global batch does not divide into the micro-batches of `world` ranks.
        """
        together = world * self.train.micro_batch
        if self.train.global_batch % together:
            below = self.train.global_batch // together * together
            fits = [str(value) for value in (below, below + together) if value > 0]
            raise UserError(
                f"train.global_batch {self.train.global_batch} does not divide into {world} ranks x "
                f"train.micro_batch {self.train.micro_batch}; the nearest that fit: {' or '.join(fits)}"
            )
        return self.train.global_batch // together

    def snapshot(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON values: what the run folder keeps and a resume compares."""
        return self.model_dump(mode="json")
