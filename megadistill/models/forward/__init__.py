"""Forward passes of transformers' models that a stage calls in another way than the whole model does."""
