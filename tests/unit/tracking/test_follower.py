"""A follower of a run sends each step and each event once, in order, whatever the tracker and the disk do."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadistill.tracking import follower as following
from megadistill.tracking.connections import RunToTrack
from megadistill.tracking.follower import Follower, Position, reason_of
from megadistill.tracking.groups import tag_of, tagged
from megadistill.train.telemetry.tensorboard import tags_of
from tests.unit.report.written_run import RECIPE, WrittenRun, step_line


class Server:
    """A tracker whose runs outlive their connections. `fails`: raises at these numbers of calls to `log`."""

    def __init__(self, *, fails: tuple[int, ...] = (), refuses: int = 0) -> None:
        self.lines: list[tuple[int, float, dict[str, float]]] = []
        self.opened: list[RunToTrack] = []
        self.closed: list[bool] = []
        self.fails, self.refuses, self.calls = fails, refuses, 0

    def connect(self, run: RunToTrack) -> "Connected":
        if self.refuses > 0:
            self.refuses -= 1
            raise ConnectionError("no route to the server")
        self.opened.append(run)
        return Connected(self, run.run_id or "run-1")

    @property
    def steps(self) -> list[int]:
        return [step for step, _, numbers in self.lines if "loss/loss" in numbers]


class Connected:
    def __init__(self, server: Server, run_id: str) -> None:
        self._server, self.run_id = server, run_id

    def log(self, step: int, time: float, numbers: Any) -> None:
        self._server.calls += 1
        if self._server.calls in self._server.fails:
            raise RuntimeError("the server is on fire")
        self._server.lines.append((step, time, dict(numbers)))

    def close(self, *, done: bool) -> None:
        self._server.closed.append(done)


def _ends_after(*turns: Callable[[], object]) -> Callable[[float], bool]:
    """A `wait` that does the turns, one at a call after the first, and then says that the run has ended."""
    left = [lambda: None, *turns]

    def wait(seconds: float) -> bool:
        if left:
            left.pop(0)()
        return not left

    return wait


def _written(folder: Path, last: int) -> WrittenRun:
    run = WrittenRun(folder)
    run.begin()
    run.steps(1, last)
    run.write()
    return run


def test_steps_and_events_are_sent_once_until_the_run_is_done(tmp_path: Path) -> None:
    run, server = _written(tmp_path, 3), Server()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # a line that is being written

    def more() -> None:
        run.steps(4, 5)
        run.save(5)
        run.write()
        (tmp_path / "DONE").touch()

    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after(more, lambda: None))
    assert server.steps == [1, 2, 3, 4, 5]
    assert server.closed == [True]
    (opened,) = server.opened
    assert (opened.recipe, opened.run_id) == (RECIPE, None)
    step, time, numbers = next(line for line in server.lines if line[0] == 5)
    assert time == run.ended[step]
    assert numbers == tagged(step_line(5, 0.5))
    events = {tag: value for _, _, line in server.lines for tag, value in line.items() if tag.startswith("events/")}
    assert events == {"events/attempt_started": 1, "events/resumed": 1, "events/checkpoint_saved": 1}


def test_a_follower_that_is_started_again_resumes_the_trackers_run(tmp_path: Path) -> None:
    run, server = _written(tmp_path, 4), Server()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    run.begin(step=2)  # the run resumed from step 2, which it takes again
    run.steps(3, 6)
    run.write()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    assert server.steps == [1, 2, 3, 4, 5, 6]
    assert [opened.run_id for opened in server.opened] == [None, "run-1"]
    assert server.closed == [False, False], "the run is not done"
    counts = [numbers["events/resumed"] for _, _, numbers in server.lines if "events/resumed" in numbers]
    assert counts == [1, 2]


def test_lines_of_a_replaced_attempt_are_not_sent_again(tmp_path: Path) -> None:
    """It may write steps that its successor has written."""
    run, server = _written(tmp_path, 3), Server()
    run.lines += [step_line(step, 0.5) for step in (2, 3, 4)]
    run.write()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    assert server.steps == [1, 2, 3, 4]


def test_validations_are_sent_at_their_steps(tmp_path: Path) -> None:
    _written(tmp_path, 4)
    path, server = tmp_path / "validation.jsonl", Server()

    def validate(step: int) -> None:
        splits = {"all": {"cross_entropy": 3.0 + step, "tokens": 64}}
        line = {"time": 1.7e9 + step, "step": step, "tokens": 256 * step, "seconds": 1.0, "splits": splits}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    validate(0)
    for step in (2, 4):
        validate(step)
        assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    sent = [(step, numbers) for step, _, numbers in server.lines if "validation/cross_entropy/all" in numbers]
    assert sent == [(step, {"validation/cross_entropy/all": 3.0 + step}) for step in (0, 2, 4)]


def test_a_follower_far_behind_holds_few_lines_and_sends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "READ_AT_ONCE", 4)
    monkeypatch.setattr(following, "SAVE_EVERY", 3)
    _written(tmp_path, 20)
    server = Server()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    assert server.steps == list(range(1, 21))


def test_a_tracker_that_fails_is_opened_anew_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _written(tmp_path, 5)
    server, waited = Server(fails=(3,), refuses=2), list[float]()

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) > 4

    with caplog.at_level(logging.WARNING):
        assert Follower(tmp_path, "wandb", connect=server.connect).follow(wait)
    assert server.steps == [1, 2, 3, 4, 5]
    assert waited == [0.0, 30.0, 60.0, 120.0, 10.0], "twice refused, once failed, then sent"
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        *["tracker wandb: ConnectionError: no route to the server"] * 2,
        "tracker wandb: RuntimeError: the server is on fire",
    ]


def test_a_tracker_that_never_answers_is_given_up_when_the_run_ends(tmp_path: Path) -> None:
    _written(tmp_path, 2)
    server = Server(refuses=99)
    follower = Follower(tmp_path, "wandb", connect=server.connect)
    assert not follower.follow(lambda seconds: True)
    assert follower.position == Position(), "so that a later follower sends all"


@pytest.mark.parametrize(
    "state",
    [
        "{",
        "[1]",
        '{"run_id": "../../x", "step": 3, "events": 0, "validation": -1}',
        '{"run_id": "a", "step": -1, "events": 0, "validation": -1}',
        '{"run_id": "a", "step": "3", "events": 0, "validation": -1}',
        '{"run_id": "a", "step": 3, "events": 0, "validation": "x"}',
        '{"run_id": 3, "step": 3, "events": 0, "validation": -1}',
        '{"run_id": "a", "step": 3, "events": 0}',
    ],
)
def test_a_damaged_position_sends_the_run_anew(tmp_path: Path, state: str, caplog: pytest.LogCaptureFixture) -> None:
    _written(tmp_path, 3)
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "wandb.json").write_text(state, encoding="utf-8")
    server = Server()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    assert server.steps == [1, 2, 3]
    assert server.opened[0].run_id is None
    assert "is damaged" in caplog.text


def test_a_server_that_is_away_for_weeks_is_tried_again(tmp_path: Path) -> None:
    _written(tmp_path, 2)
    server, waits, failures = Server(refuses=1100), list[float](), 1100
    ends = _ends_after(*[lambda: None] * failures)

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return ends(seconds)

    assert Follower(tmp_path, "wandb", connect=server.connect).follow(wait)
    assert server.steps == [1, 2]
    assert waits[1:3] == [following.RETRY_SECONDS, 2 * following.RETRY_SECONDS]
    assert waits[failures] == following.MAX_RETRY_SECONDS


def test_a_position_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    _written(tmp_path / "run", 3)
    (tmp_path / "notes").write_text("of a person\n", encoding="utf-8")
    (tmp_path / "run" / "tracking").mkdir()
    (tmp_path / "run" / "tracking" / "wandb.json").symlink_to(tmp_path / "notes")
    server = Server()
    assert Follower(tmp_path / "run", "wandb", connect=server.connect).follow(_ends_after())
    assert server.steps == [1, 2, 3]
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "of a person\n"
    assert Follower(tmp_path / "run", "wandb").position.step == 3


def test_no_secret_is_sent_or_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = WrittenRun(tmp_path)
    run.steps(1, 1)
    run.write({**RECIPE, "data": {"manifest": "s3://user:hunter22@host/manifest.json"}})
    server = Server()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    assert "hunter22" not in str(server.opened)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert reason_of(RuntimeError("401:\n key 0123456789abcdef")) == "RuntimeError: 401: key ***"


def test_alien_lines_are_left_out(tmp_path: Path) -> None:
    _written(tmp_path, 2)
    alien = {"step": 3, "loss": 1.0, "x" * 300: 1, "a\nb": 1, "deep": {"er": {"x": 2.0}}, "n": float("nan"), "s": "t"}
    nested = '{"d":' * 500 + "1" + "}" * 500
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(alien) + f'\n[]\n{{"step": 4, "loss": 2.0, "seconds": 1{"0" * 400}}}\n')
        file.write(f'{{"step": 5, "loss": 3.0, "large": 1{"0" * 400}, "deep": {nested}}}\n')
    event = {"time": 1.0, "attempt": 1, "step": 5}
    with open(tmp_path / "events.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({**event, "event": name}) + "\n" for name in ("a\nb", "x" * 300, "stopped"))
    server = Server()
    assert Follower(tmp_path, "wandb", connect=server.connect).follow(_ends_after())
    assert [numbers for step, _, numbers in server.lines if step == 3] == [{"loss/loss": 1.0, "deep/er/x": 2.0}]
    late = [numbers for step, _, numbers in server.lines if step > 3]
    assert late == [{"loss/loss": 3.0}, {}, {}, {"events/stopped": 1.0}]


def test_groups_are_tensorboards() -> None:
    """But for the teacher's, which TensorBoard has in a run of its own."""
    norms = {"gradient": {"layers.0": 2.0}, "clipped_steps": 0.5}
    tags = tagged({"time": 1.0, **step_line(7, 0.5), "norms": norms, "expert_load": {"0": [1.0]}})
    teachers = {"loss/teacher_cross_entropy", "predictions/teacher_entropy"}
    nested = {"norms/gradient/layers.0", "norms/clipped_steps"}
    plain = {name for name in step_line(7, 0.5) if name not in ("step", "mfu", "teacher_ce", "teacher_entropy")}
    assert {*tags} == {tags_of(name)[0] for name in plain} | teachers | nested
    assert tags["loss/teacher_cross_entropy"] == 3.0
    assert tag_of("teacher_ce") == tag_of("student_ce") == "loss/cross_entropy"
