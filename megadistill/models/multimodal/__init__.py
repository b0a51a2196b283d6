"""The language model of a folder of a multimodal model: its config and its tensors, where they lie."""
