"""The student: a Hugging Face model under ZeRO-3. The only room that knows deepspeed."""

import os

import torch

# DeepSpeed asks for its accelerator when it is imported, and takes the machine for a GPU's where it finds none.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
