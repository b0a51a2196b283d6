"""Process groups beside those of torch's default world."""
