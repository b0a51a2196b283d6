"""Hooks that the training loop runs after each step, one class a file."""
