"""Room `train`: going back before a loss spike and leaving out what it read (PaLM, 2204.02311, 5.1). It runs no step.

`rollbacks.json` in the run folder is written before anything else is done, so that a run which is killed in the middle
of a rollback goes on the same way: checkpoints of the line that was given up are known by the number of rollbacks that
their manifests count.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadistill.errors import OperatorFault
from megadistill.train.checkpoint.format import CheckpointManifest, sync_folder, write_durably

MAX_RECORD_BYTES = 16 << 20


class Rollback(BaseModel):
    """One of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_step: int = Field(ge=1)
    """The step of the spike."""
    to_step: int = Field(ge=0)
    """The checkpoint that the run went back to."""
    skip: tuple[int, int]
    """The slots [first, stop) that are left out from then on."""
    reason: str


def read_rollbacks(folder: Path) -> list[Rollback]:
    """Those of a run folder, the oldest first.

    Raises:
        OperatorFault: the record is damaged.
    """
    path = folder / "rollbacks.json"
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(MAX_RECORD_BYTES))
        return [Rollback.model_validate(value) for value in values]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, RecursionError, ValidationError) as error:
        raise OperatorFault(f"{path} is damaged ({str(error).splitlines()[0]}): bring it back from a copy") from None


def record_rollbacks(folder: Path, rollbacks: Sequence[Rollback]) -> None:
    """Writes them, whole or not at all."""
    temporary = folder / ".rollbacks.json.tmp"
    content = json.dumps([each.model_dump(mode="json") for each in rollbacks], indent=1) + "\n"
    write_durably(temporary, content.encode())
    temporary.replace(folder / "rollbacks.json")
    sync_folder(folder)


def plan_rollback(
    at_step: int,
    reason: str,
    *,
    steps: int,
    slots_before: Mapping[int, int],
    slots_end: int,
    checkpoints: Sequence[int],
) -> Rollback | None:
    """Leaves out the slots of the last `steps` steps up to `at_step`, from the newest checkpoint before them.

    `slots_before`: the next slot before each of the last steps; `slots_end`: the one behind `at_step`. None where no
    checkpoint is that old.
    """
    first = max(at_step - steps + 1, min(slots_before))
    old_enough = [step for step in checkpoints if step < first]
    if not old_enough:
        return None
    return Rollback(at_step=at_step, to_step=max(old_enough), skip=(slots_before[first], slots_end), reason=reason)


def given_up(manifest: CheckpointManifest, rollbacks: Sequence[Rollback]) -> bool:
    """Whether a checkpoint lies on a line of the run that a later rollback left."""
    return any(manifest.step > later.to_step for later in rollbacks[manifest.rollbacks :])
