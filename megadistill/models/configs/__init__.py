"""Configs that are read as those of a part of their model."""
