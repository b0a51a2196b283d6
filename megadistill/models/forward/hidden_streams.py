"""Several streams of hidden states between layers: Gemma 3n's, of which each layer predicts all and corrects them."""

from transformers import PretrainedConfig


def hidden_streams(config: PretrainedConfig) -> int:
    """Hidden states of a token between two layers, each of the model's width."""
    return int(getattr(config, "altup_num_inputs", None) or 1)
