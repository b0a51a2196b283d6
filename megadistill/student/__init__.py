"""The student: a Hugging Face model under DeepSpeed's ZeRO-3. No other package imports deepspeed."""

import os

import torch

# DeepSpeed chooses its accelerator when it is imported, and assumes a GPU if it detects none.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
