"""What a teacher says, kept: targets that a run learns from without it, and texts that it wrote, as commands."""

import pytest

from megadistill.cli import main
from megadistill.data import Manifest
from tests.e2e.commands import PLAIN, settings, succeed
from tests.e2e.conftest import Place
from tests.paths import ROOT


def test_a_run_learns_from_targets_that_were_stored(place: Place) -> None:
    def command(name: str, **changes: object) -> list[str]:
        alone = settings(comm__vocab_group=1, loss__targets__draws=8, **changes)
        return [*place.distill(name, steps=3, checkpoint_every=3), *alone]

    targets = place.folder / "targets"
    cached = succeed(*PLAIN, "cache", *command("none")[1:], "--output", str(targets))
    assert "targets of 24 sequences" in cached.out
    assert not (place.folder / "none").exists()
    succeed(*PLAIN, *command("live"))
    stored = {"teacher__path": "null", "teacher__source": "cache", "teacher__targets": targets}
    succeed(*PLAIN, *command("stored", **stored))
    live, found = (place.metrics(name) for name in ("live", "stored"))
    assert [line["loss"] for line in found] == [line["loss"] for line in live]


def test_a_recipe_reads_what_the_teacher_wrote(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    written, data = place.folder / "written", place.folder / "data" / "train" / "manifest.json"
    sizes = ["--sequences", "20", "--prompt-tokens", "8", "--new-tokens", "25", "--batch", "16"]
    assert main(["generate", str(place.teacher), "--data", str(data), *sizes, "--output", str(written)]) == 0
    manifest = written / "train" / "manifest.json"
    assert Manifest.load(manifest).sequence_length == 32
    recipe = ["recipes/smoke-sequence.yaml", *settings(data__manifest=manifest)]
    assert main(["plan", *recipe, "--ranks", "1"]) == 0
    assert "tokens written" in capsys.readouterr().out
    assert main(["shards", "verify", str(written)]) == 0
