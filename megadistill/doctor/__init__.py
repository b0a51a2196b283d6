"""Checks before a run: recipe, nodes, launch, and one small step."""
