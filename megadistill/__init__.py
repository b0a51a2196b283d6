"""megadistill: token-level distillation of a large frozen teacher into a large student, at pretraining scale."""

__version__ = "0.1.0"
