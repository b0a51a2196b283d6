"""Held-out splits and the measures of a model on them: one definition, for evaluations and for validation in a run."""
