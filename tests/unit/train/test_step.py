"""The recipe's loss section says what the loss room computes, name by name."""

from dataclasses import asdict

from megadistill.config import LossSection
from megadistill.train.step import divergence


def test_every_key_of_the_recipe_reaches_the_loss() -> None:
    section = LossSection(temperature=2.5, temperature_squared=True, kd_weight=0.7, ce_weight=0.3, z_loss=1e-4)
    found = asdict(divergence(section))
    assert found.pop("kind").value == section.divergence
    assert found == section.model_dump(exclude={"divergence", "chunk_tokens"})
