"""Structured pruning of a model by the importance of its parts on some text (Minitron, 2407.14679)."""
