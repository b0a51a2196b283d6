"""megadistill: token-level distillation of a large frozen teacher into a large student, at pretraining scale."""

import os

# transformers can fetch kernels from a hub and import them. It reads this when it is imported, hence so early.
os.environ["USE_HUB_KERNELS"] = "NO"

__version__ = "0.1.0"
