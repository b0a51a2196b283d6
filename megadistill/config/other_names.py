"""Names that other trainers give to the keys and values of a recipe, and the key that a mistyped name stands for."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megadistill.config.recipe import Recipe, Section, sections_in
from megadistill.errors import nearest, nearest_of

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "run.folder": (
        "output_dir",
        "out_dir",
        "run.output",
        "run.dir",
        "run.path",
        "dump_folder",
        "checkpoint_dir",
        "logging_dir",
    ),
    "run.time_limit_minutes": ("time_limit", "max_time", "exit_duration_in_mins"),
    "run.seed": ("random_seed", "data_seed"),
    "data.manifest": (
        "data_path",
        "dataset",
        "dataset_name",
        "dataset_path",
        "train_data",
        "train_file",
        "data.path",
        "data.train",
    ),
    "data.sources": ("datasets", "mixture", "data_sources"),
    "data.prefetch": ("num_workers", "dataloader_num_workers", "prefetch_factor", "dataloader_prefetch_factor"),
    "data.insert_bos": ("add_bos", "add_bos_token", "prepend_bos", "bos"),
    "data.document_mask": ("reset_attention_mask", "reset_position_ids", "intra_document_masking"),
    "student.config": ("model", "model_name_or_path", "student_model", "student.path", "student.model", "student.name"),
    "student.weights": ("init_from", "from_pretrained", "load", "initial_checkpoint", "pretrained_checkpoint"),
    "student.deepspeed": ("ds_config", "deepspeed_config", "zero_stage", "fsdp", "zero_optimization"),
    "student.activation_checkpointing": (
        *("gradient_checkpointing", "recompute_activations", "activation_checkpoint", "recompute_granularity"),
        *("activation_recompute", "selective_activation_checkpointing", "ac_mode"),
    ),
    "student.activation_offload": ("cpu_offloading", "activation_cpu_offload", "activation_offloading"),
    "student.vocab_multiple": ("make_vocab_size_divisible_by", "pad_to_multiple_of"),
    "teacher.path": (
        *("teacher_model", "teacher_model_name_or_path", "teacher_name_or_path", "teacher.model", "teacher.name"),
        *("teacher.config", "teacher.folder"),
    ),
    "teacher.stages": ("pipeline_model_parallel_size", "pipeline_parallel_size", "pipeline_parallel_degree", "pp"),
    "distributed.vocab_group": ("tensor_model_parallel_size", "tensor_parallel_size", "tensor_parallel_degree", "tp"),
    "distributed.sequence": (
        *("context_parallel_size", "context_parallel_degree", "cp", "sequence_parallel_size", "sp_size"),
        *("sequence_parallel", "sequence_parallel_degree", "ulysses_degree"),
    ),
    "distributed.timeout_minutes": ("distributed_timeout_minutes", "ddp_timeout", "timeout", "init_timeout_seconds"),
    "loss.divergence": (
        "loss_type",
        "loss.type",
        "loss.kind",
        "loss.name",
        "kd_loss_type",
        "divergence_type",
        "kl_type",
    ),
    "loss.temperature": ("kd_temperature", "distill_temperature", "distillation_temperature", "tau"),
    "loss.kd_weight": ("kd_alpha", "alpha_kd", "kd_ratio", "distill_weight", "distillation_weight", "alpha_distill"),
    "loss.ce_weight": ("alpha_ce", "ce_alpha", "hard_label_weight", "label_weight", "lm_loss_weight"),
    "loss.beta": ("jsd_beta", "gkd_beta"),
    "loss.router_aux_loss_coef": (
        "moe_aux_loss_coeff",
        "aux_loss_coef",
        "aux_loss_alpha",
        "load_balancing_loss_weight",
    ),
    "loss.router_z_loss_coef": ("moe_z_loss_coeff", "moe_zloss_weight", "router_z_loss"),
    "loss.z_loss": ("z_loss_weight", "z_loss_coef", "z_loss_multiplier", "output_z_loss"),
    "train.tokens": ("train_tokens", "max_tokens", "total_tokens", "num_tokens"),
    "train.steps": (
        "steps",
        *("max_steps", "num_steps", "train_steps", "training_steps", "num_train_steps", "total_steps", "iterations"),
        *("train_iters", "max_iters", "num_iterations", "total_num_steps"),
    ),
    "train.global_batch": ("batch_size", "global_batch_size", "train_batch_size", "total_batch_size"),
    "train.micro_batch": (
        *("micro_batch_size", "per_device_train_batch_size", "per_device_batch_size", "local_batch_size"),
        *("train_micro_batch_size_per_gpu", "device_batch_size"),
    ),
    "train.precision": ("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision", "mixed_precision_param", "amp"),
    "train.max_grad_norm": ("gradient_clipping", "clip_grad", "grad_clip", "grad_norm_clip", "max_norm"),
    "train.optimizer.learning_rate": ("lr", "max_lr", "peak_lr", "base_lr"),
    "train.optimizer.weight_decay": ("wd",),
    "train.optimizer.beta1": ("adam_beta1",),
    "train.optimizer.beta2": ("adam_beta2",),
    "train.optimizer.epsilon": ("adam_epsilon", "adam_eps", "eps"),
    "train.optimizer.kind": ("optim", "optimizer_type", "optimizer_name", "optimizer.name", "optimizer.type"),
    "train.schedule.kind": ("lr_scheduler_type", "lr_scheduler", "lr_decay_style", "schedule.name", "schedule.type"),
    "train.schedule.warmup_steps": (
        *("warmup", "num_warmup_steps", "lr_warmup_steps", "warmup_num_steps", "lr_warmup_iters", "warmup_iters"),
    ),
    "train.schedule.warmup_tokens": ("lr_warmup_tokens", "warmup_num_tokens"),
    "train.schedule.decay_tokens": ("lr_decay_tokens", "cooldown_tokens"),
    "train.schedule.decay_steps": ("lr_wsd_decay_iters", "num_decay_steps", "cooldown_steps", "cooldown"),
    "train.schedule.final_ratio": ("min_lr_ratio", "lr_min_ratio", "min_lr_factor"),
    "train.checkpoint_every": ("save_steps", "save_interval", "save_every", "checkpoint_interval"),
    "train.log_every": ("logging_steps", "log_interval", "log_freq", "logging_interval"),
    "checkpoint.keep_last": ("save_total_limit", "keep_latest_k", "max_checkpoints"),
    "checkpoint.asynchronous": ("async_save", "async_mode", "enable_async_checkpoint"),
    "validation.every": ("eval_steps", "eval_interval", "eval_every", "val_check_interval", "validation.interval"),
    "validation.data": ("eval_dataset", "eval_data", "valid_data_path", "validation_file", "validation.sources"),
    "validation.sequences": ("eval_iters", "limit_val_batches", "max_eval_samples", "validation.samples"),
    "validation.patience": ("early_stopping_patience",),
    "track": ("report_to", "logger", "loggers", "log_with", "trackers"),
    "profile": ("profiling", "profiler", "enable_profiling", "use_pytorch_profiler"),
    "train.norms_every": ("log_params_norm", "track_grad_norm", "watch_gradients"),
    "resilience.step_timeout_seconds": ("train_timeout_seconds", "nccl_timeout"),
}
"""Key of a recipe -> its names in HF Trainer, TRL, Megatron-LM, torchtitan, DeepSpeed, NeMo and others.

`section.name` is a name in that section only."""

EXPLAINED = {
    "it follows from train.global_batch / (ranks x train.micro_batch): leave it out": (
        *("gradient_accumulation_steps", "gradient_accumulation", "grad_accumulation", "grad_accum"),
        *("grad_accumulation_steps", "accumulate_grad_batches", "accumulation_steps", "accumulation"),
    ),
    "a run is measured in steps: set train.steps (an epoch has the split's sequences / train.global_batch)": (
        *("epochs", "num_epochs", "num_train_epochs", "max_epochs"),
    ),
    "set train.steps (samples / train.global_batch)": ("train_samples", "max_samples", "num_samples"),
    "entries of data.curriculum have their own global_batch": ("rampup_batch_size", "batch_size_rampup", "batch_ramp"),
    "the shards have it: megadistill tokenize --sequence-length": (
        *("seq_len", "seq_length", "sequence_length", "max_length", "max_seq_len", "max_seq_length", "block_size"),
        *("context_length", "max_sequence_length"),
    ),
    "set train.schedule.warmup_steps (the ratio x train.steps)": ("warmup_ratio", "lr_warmup_fraction"),
    "set train.schedule.final_ratio (min_lr / learning_rate)": ("min_lr", "lr_min", "eta_min"),
    "set train.optimizer.beta1 and beta2": ("betas", "adam_betas"),
    "the shards have it: megadistill tokenize --tokenizer": ("tokenizer", "tokenizer_path", "tokenizer_name_or_path"),
    "nothing to set: the same command resumes the run of run.folder": (
        *("resume", "resume_from_checkpoint", "resume_if_exists", "auto_resume"),
    ),
    "set validation.every, and name the splits in validation.data": (
        *("eval_strategy", "evaluation_strategy", "do_eval", "evaluation", "validate", "per_device_eval_batch_size"),
        *("data.val", "data.valid", "data.validation", "data.eval", "data.test", "data.heldout"),
    ),
    "set track: [tensorboard, wandb] or [mlflow]; project and key are the tracker's own variables (docs/trackers)": (
        *("wandb", "wandb_project", "use_wandb", "enable_wandb", "mlflow", "metrics"),
        *("tensorboard", "tensorboard_dir", "enable_tensorboard"),
    ),
    "not implemented: the README's limitations": (
        *("expert_model_parallel_size", "ep", "expert_parallel_size", "expert_parallel_degree"),
        *("lora", "peft", "use_peft"),
    ),
    "the share of the divergence is loss.kd_weight, that of the labels loss.ce_weight (loss.alpha is a parameter of "
    "skew_kl)": ("alpha",),
}
"""An explanation for names of other trainers that have no key here -> these names."""

OTHER_VALUES: dict[str, tuple[str, ...]] = {
    "labels": ("label", "ce", "pretrain", "pretraining", "lm", "sft"),
    "distill": ("kd", "distillation", "distil"),
    "bfloat16": ("bf16", "bf16-mixed", "torch.bfloat16", "fp16", "float16", "half"),
    "float32": ("fp32", "f32", "full", "torch.float32"),
    "forward_kl": ("kl", "kld", "kl_div", "fkl", "forward", "kl_divergence"),
    "reverse_kl": ("rkl", "reverse", "reversed_kl"),
    "jsd": ("js", "gkd", "generalized_jsd", "jensen_shannon"),
    "tvd": ("tv", "total_variation"),
    "skew_kl": ("skew", "skl", "distillm"),
    "top_k": ("topk",),
    "top_p": ("topp", "nucleus"),
    "wsd": ("warmup_stable_decay", "trapezoidal", "linear"),
    "none": ("false", "no", "off"),
    "full": ("true", "yes", "on"),
    "cosine": ("cosine_with_min_lr", "cosine_annealing"),
}
"""Value of an enumeration -> its other names. Only among the values that a key has."""


@dataclass(frozen=True)
class WayOut:
    """The answer to a key that a recipe does not have."""

    text: str
    key: str | None = None
    """The full key that replaces it, if a single one does."""


def way_out(path: Sequence[str], siblings: Collection[str]) -> WayOut:
    """The answer to the unknown key `path`, beside which its section has the keys `siblings`."""
    *section, name = path
    prefix = ".".join(section) + "." if section else ""
    known = list(key_names(Recipe, ""))
    written = _normal(name)
    name_only, colon, value = name.partition(":")
    if colon and name_only in siblings:
        return WayOut(f"; a space is missing after the colon: write {name_only}: {value}")
    if "." in name and f"{prefix}{name}" in known:
        head, _, rest = name.rpartition(".")
        return WayOut(f"; in a file, sections are nested: write {head.replace('.', ': {')}: {{{rest}: ...}}"
                      f"{'}' * head.count('.')}", f"{prefix}{name}")  # fmt: skip
    if written in siblings:
        return WayOut(f"; did you mean '{written}'?", f"{prefix}{written}")
    if (other := _of_other_name(path)) is not None:
        return other
    if close := nearest_of(written, siblings):
        return WayOut(f"; did you mean '{close}'?", f"{prefix}{close}")
    everywhere = {key.rpartition(".")[2]: key for key in known}
    if close := nearest_of(written, everywhere, cutoff=0.8):
        return WayOut(f"; did you mean {everywhere[close]}?", everywhere[close])
    return WayOut(f"; {'.'.join(section) or 'a recipe'} has {', '.join(siblings)}")


def _of_other_name(path: Sequence[str]) -> WayOut | None:
    """The answer to the name of another trainer, or to a key of another section; None: it is none."""
    *section, name = path
    written, prefix = _normal(name), ".".join(section) + "." if section else ""
    names = {written, f"{section[-1]}.{written}" if section else written}
    if explained := [text for text, others in EXPLAINED.items() if names & {*others}]:
        return WayOut(f"; {explained[0]}")
    same = [key for key in key_names(Recipe, "") if key.rpartition(".")[2] == written and "[]" not in key]
    candidates = [key for key, others in OTHER_NAMES.items() if names & {*others}] or same
    if section and candidates == [written]:
        return WayOut(f"; {written} is a section of its own: write it without indentation", written)
    if not candidates:
        return None
    near = [key for key in candidates if key.startswith(prefix)] or candidates
    return WayOut(f"; use {' or '.join(near[:3])}", near[0] if len(near) == 1 else None)


def key_of_option(option: str) -> WayOut | None:
    """The key that an option such as `--lr` or `--train.steps` stands for; None: it is no name of a key."""
    path = option.lstrip("-").replace("-", "_").split(".")
    if ".".join(path) in key_names(Recipe, ""):
        return WayOut("", ".".join(path))
    return _of_other_name(path)


def nearest_value(value: str, known: Collection[str]) -> str:
    """`"; did you mean 'x'?"` for the member of an enumeration that `value` stands for, or an empty string."""
    for member in known:
        if _normal(value) in OTHER_VALUES.get(member, ()):
            return f"; did you mean '{member}'?"
    return nearest(value, known)


def key_names(model: type[Section], prefix: str) -> Iterator[str]:
    """The full names of all keys and sections; those of a list's items as `section.list[].key`."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in sections_in(field.annotation):
            items = "[]" if "list[" in str(field.annotation) else ".NAME" if "dict[" in str(field.annotation) else ""
            yield from key_names(section, f"{prefix}{name}{items}.")


def _normal(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").lower()
