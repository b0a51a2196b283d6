"""For every test: one thread a process (the ranks share two cores), DeepSpeed told where it is, no time limit for an
example of hypothesis (a busy machine would exceed it)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
