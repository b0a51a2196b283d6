"""A run's memory, time and cost before it starts, counted from the real models on the meta device."""
