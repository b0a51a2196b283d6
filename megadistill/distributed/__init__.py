"""Communication: who the ranks are, how they talk. The only room that imports torch.distributed."""
