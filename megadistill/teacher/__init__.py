"""The frozen teacher: a stage of its layers on each rank, hidden states as its signal."""
