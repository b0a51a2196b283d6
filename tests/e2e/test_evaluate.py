"""evaluate and sample, as a user types them."""

import json

from megadistill.data import Manifest
from tests.e2e.commands import TORCHRUN_2, in_process, succeed, succeeded
from tests.e2e.conftest import Place
from tests.unit.data.splits import random_sequences, write_split


def test_two_ranks_find_what_one_process_finds(place: Place) -> None:
    alone, shared, plots = (place.folder / name for name in ("alone.json", "shared.json", "plots"))
    of_the_teacher = Manifest.load(place.heldout)
    ids = of_the_teacher.vocab_size
    units = random_sequences(24, seed=1, sequence=of_the_teacher.sequence_length, vocab=ids)
    write_split(place.folder / "small", units, vocab=ids, tokenizer_sha256=of_the_teacher.tokenizer.sha256)
    data = f"library={place.folder / 'small' / 'manifest.json'}"
    command = ["evaluate", str(place.teacher), "--data", data, "--batch", "4"]
    finished = succeeded(in_process(*command, "--json", str(alone), "--plots", str(plots)))
    assert "calibration error" in finished.out
    assert (plots / "calibration.png").stat().st_size > 5_000
    finished = succeed(*TORCHRUN_2, *command, "--json", str(shared))
    assert finished.out.count("held-out") == 1, "one rank speaks"
    (one,), (two,) = (json.loads(path.read_text()) for path in (alone, shared))
    for name, value in one.items():
        if isinstance(value, float):
            assert abs(two[name] - value) <= 1e-9 * abs(value), name
    assert two["by_source"][0]["source"] == "library"
    assert two["tokens"] == one["tokens"] == sum(part["count"] for part in two["calibration"])


def test_a_sample_is_the_same_each_time(place: Place) -> None:
    written = place.folder / "samples.json"
    command = ["sample", str(place.teacher), "--prompt", "def ", "--data", place.heldout, "--sequences", "1",
               "--prompt-tokens", "8", "--new-tokens", "12", "--count", "2"]  # fmt: skip
    first = succeeded(in_process(*command, "--json", str(written)))
    assert first.out == succeeded(in_process(*command)).out
    assert first.out != succeeded(in_process(*command, "--seed", "2")).out
    typed, held_out = json.loads(written.read_text())
    assert typed["prompt"] == "def "
    assert typed["original"] is None
    assert held_out["original"]
    assert [len(one["continuations"]) for one in (typed, held_out)] == [2, 2]
    nothing = in_process("sample", str(place.teacher))
    assert nothing.code == 2
    assert "--prompt TEXT" in nothing.err
