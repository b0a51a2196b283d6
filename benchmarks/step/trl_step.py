"""TRL's distillation step: its `GKDTrainer` on given tokens (`lmbda` 0) with forward KL (`beta` 0), under ZeRO-3.

`trl` is imported when the step is built: it is no dependency of this package (`pip install trl accelerate datasets`).
"""

import os
import threading
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from megadistill.distributed.topology import Topology


class TrlStep:
    """A training loop of TRL's that stands still between two calls of `step`.

    It runs in a thread, since the trainer owns its loop. The process must not build another model afterwards:
    transformers partitions every model under ZeRO-3 while the trainer's settings live.

    Raises:
        ImportError: trl is not installed.
    """

    def __init__(
        self,
        student: Path,
        teacher: Path,
        rows: list[list[int]],
        *,
        micro_batch: int,
        engine_config: dict[str, Any],
        topology: Topology,
        folder: Path,
    ) -> None:
        os.environ.update(RANK=str(topology.rank), WORLD_SIZE=str(topology.world), LOCAL_RANK=str(topology.local_rank))
        from datasets import Dataset  # noqa: PLC0415
        from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: PLC0415

        self._go: Queue[None] = Queue()
        self._done: Queue[BaseException | None] = Queue()
        go, done = self._go, self._done

        class Paces(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                go.get()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                done.put(None)

        arguments = GKDConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=micro_batch,
            max_steps=1_000_000,
            max_grad_norm=engine_config["gradient_clipping"],
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            deepspeed={**engine_config, "train_batch_size": micro_batch * topology.world},
            use_cpu=topology.device.type == "cpu",
            bf16=engine_config["bf16"]["enabled"],
            activation_checkpointing=False,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            disable_dropout=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self._trainer = GKDTrainer(
            model=model,
            teacher_model=frozen,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            data_collator=_collated,
            processing_class=_tokenizer(),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
            callbacks=[Paces()],
        )
        threading.Thread(target=self._train, daemon=True).start()

    def step(self) -> None:
        """One optimizer step."""
        self._go.put(None)
        error = self._done.get()
        if error is not None:
            raise error

    def _train(self) -> None:
        torch.set_num_threads(1)
        try:
            self._trainer.train()
        except BaseException as error:
            self._done.put(error)


def _collated(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    tokens = torch.tensor([sample["input_ids"] for sample in samples])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainer asks for one, and uses nothing of it but its pad token."""
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
