"""The script that one would write first: DeepSpeed's ZeRO-3 engine around transformers' model, the whole teacher in
each process, the logits of all tokens, `F.kl_div`.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM


class ObviousScript:
    """Student and teacher of Hugging Face folders, and the step on a micro-batch."""

    def __init__(self, student: Path, teacher: Path, *, engine_config: dict[str, Any], device: torch.device) -> None:
        dtype = torch.bfloat16 if engine_config["bf16"]["enabled"] else torch.float32
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype).to(device).eval()
        model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step on tokens [B, S]; returns KL(teacher ‖ student), the mean over this rank's tokens."""
        with torch.no_grad():
            teacher = self.teacher(tokens, use_cache=False).logits
        student = self.engine(tokens, use_cache=False).logits
        log_p_student = F.log_softmax(student.float().flatten(0, 1), dim=-1)
        log_p_teacher = F.log_softmax(teacher.float().flatten(0, 1), dim=-1)
        loss = F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()
