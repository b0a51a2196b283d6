"""Ranks, process groups, collectives and messages: the one package that imports torch.distributed."""
