"""What a run will need, before it starts: counted from the real models on the meta device. It starts nothing."""
