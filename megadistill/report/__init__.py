"""What people look at after a run: evaluation tables and plots. It trains nothing."""
