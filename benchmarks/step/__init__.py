"""Time and memory of a whole distillation step, beside its own matrix products and other implementations of it."""
