"""The commands store-targets and generate: targets and text of a teacher, for runs without it."""

from megadistill.data import Manifest
from tests.e2e.commands import forked, in_process, settings, succeeded
from tests.e2e.conftest import Place


def test_a_run_learns_from_targets_that_were_stored(place: Place) -> None:
    def command(name: str, **changes: object) -> list[str]:
        alone = settings(distributed__vocab_group=1, loss__targets__draws=8, **changes)
        return [*place.distill(name, steps=3, checkpoint_every=3), *alone]

    targets = place.folder / "targets"
    cached = succeeded(forked("store-targets", *command("none")[1:], "--output", str(targets)))
    assert "targets of 24 sequences" in cached.out
    assert not (place.folder / "none").exists()
    succeeded(forked(*command("live")))
    stored = {"teacher__path": "null", "teacher__source": "stored", "teacher__targets": targets}
    succeeded(forked(*command("stored", **stored)))
    live, stored_targets = (place.metrics(name) for name in ("live", "stored"))
    assert [line["loss"] for line in stored_targets] == [line["loss"] for line in live]


def test_a_recipe_reads_what_the_teacher_wrote(place: Place) -> None:
    written, data = place.folder / "written", place.folder / "data" / "train" / "manifest.json"
    sizes = ["--sequences", "20", "--prompt-tokens", "8", "--new-tokens", "25", "--batch", "16"]
    done = in_process("generate", str(place.teacher), "--data", str(data), *sizes, "--output", str(written))
    assert "tokens written" in succeeded(done).out
    manifest = written / "train" / "manifest.json"
    assert Manifest.load(manifest).sequence_length == 32
    recipe = ["recipes/smoke-sequence.yaml", *settings(data__manifest=manifest)]
    succeeded(in_process("plan", *recipe, "--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100"))
    succeeded(in_process("shards", "verify", str(written)))
