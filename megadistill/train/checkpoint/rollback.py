"""Rollback to before a loss spike, skipping the data of the steps around it (PaLM, 2204.02311, 5.1).

`rollbacks.json` in the run folder is written first, so that a run which is killed during a rollback resumes with it:
the number of rollbacks in a checkpoint's manifest shows whether a rollback abandoned the checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from megadistill.errors import OperatorFault
from megadistill.io import NotRegularError, read_json, write_json
from megadistill.train.checkpoint.format import CheckpointManifest


class Rollback(BaseModel):
    """One entry of rollbacks.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_step: int = Field(ge=1)
    """The step of the spike."""
    to_step: int = Field(ge=0)
    """Step of the checkpoint that the run went back to."""
    skipped_slots: tuple[int, int]
    """Slots [first, stop) that are left out from then on."""
    reason: str


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of a run folder, oldest first.

    Raises:
        OperatorFault: the record is damaged.
    """
    path = folder / "rollbacks.json"
    try:
        return [Rollback.model_validate(value) for value in read_json(path)]
    except FileNotFoundError:
        return []
    except (IsADirectoryError, NotRegularError, ValueError, TypeError) as error:
        raise OperatorFault(f"{path} is damaged ({str(error).splitlines()[0]}): restore it from a copy") from None


def record_rollbacks(folder: Path, rollbacks: Sequence[Rollback]) -> None:
    write_json(folder / "rollbacks.json", [each.model_dump(mode="json") for each in rollbacks])


def plan_rollback(
    at_step: int,
    reason: str,
    *,
    steps: int,
    slots_before: Mapping[int, int],
    slots_end: int,
    checkpoints: Sequence[int],
) -> Rollback | None:
    """A rollback to the newest checkpoint before the last `steps` steps up to `at_step`, skipping their slots.

    `slots_before`: the first slot of each of the last steps; `slots_end`: the first slot after `at_step`. None where no
    checkpoint is that old.
    """
    first = max(at_step - steps + 1, min(slots_before))
    old_enough = [step for step in checkpoints if step < first]
    if not old_enough:
        return None
    return Rollback(
        at_step=at_step, to_step=max(old_enough), skipped_slots=(slots_before[first], slots_end), reason=reason
    )


def is_abandoned(manifest: CheckpointManifest, rollbacks: Sequence[Rollback]) -> bool:
    """Whether a later rollback went back to before this checkpoint."""
    return any(manifest.step > later.to_step for later in rollbacks[manifest.rollbacks :])
