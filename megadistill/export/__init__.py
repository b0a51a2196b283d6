"""From a run to a Hugging Face folder, with a card that says what it was trained on. It starts no ranks."""
