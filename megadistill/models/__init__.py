"""Hugging Face models: built from a config, cut by layers, read by slices, exported."""
