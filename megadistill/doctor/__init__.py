"""What stands against a run, before it starts: recipe, nodes, launch, and one small step. It trains nothing."""
