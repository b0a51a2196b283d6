"""`megadistill doctor` as it is typed, under a launcher, for a recipe that would run."""

import json

from tests.e2e.commands import TORCHRUN_2, succeed
from tests.e2e.conftest import Place


def test_a_recipe_that_would_run_is_well(place: Place) -> None:
    arguments = place.distill("doctor", steps=4, checkpoint_every=4)
    told = place.folder / "doctor.json"
    examine = [*TORCHRUN_2, "doctor", *arguments[1:], "--json", str(told)]
    finished = succeed(*examine)
    rows = {row["what"]: row for row in json.loads(told.read_text())["rows"]}
    assert {what for what, row in rows.items() if row["mark"] == "bad"} == set()
    assert {"teacher's weights", "host memory", "disk space", "pairs of ranks", "rehearsal"} <= rows.keys()
    assert "2 ranks on 1 node" in rows["world"]["said"]
    assert "rehearsal" in finished.out
    assert not (place.folder / "doctor").exists()  # it leaves nothing behind
