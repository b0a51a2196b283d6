"""Attention of the supported families: which implementation computes it, its masks, and our own one."""
