"""The front door without the rooms: its words, its exit codes, and who speaks for a node."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megadistill import __version__
from megadistill.cli.main import entry, main
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError

VERBS = ("tokenize", "train", "export", "evaluate", "plan")
EXPORT = ("export", "run", "--output", "out")

Export = Callable[..., int]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[[Export], None]:
    """Puts a function where the verb `export` finds its room."""

    def replace(function: Export) -> None:
        room: Any = ModuleType("megadistill.export.export_run")
        room.export_run = function
        monkeypatch.setitem(sys.modules, "megadistill.export.export_run", room)

    return replace


def _raises(error: BaseException) -> Export:
    def export_run(*arguments: object, **options: object) -> int:
        raise error

    return export_run


def _exits(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_help_names_every_verb_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits("--help") == 0
    said = capsys.readouterr().out
    for part in (*VERBS, "exit codes", "--version"):
        assert part in said
    assert "local_rank" not in said, "a launcher's option is not for people"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_the_exit_codes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits(verb, "--help") == 0
    said = capsys.readouterr().out
    assert f"usage: megadistill {verb} " in said
    assert "exit codes: 0 done" in said
    assert "None" not in said


def test_the_help_of_train_shows_each_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits("train", "--help") == 0
    said = capsys.readouterr().out
    assert "torchrun --nproc_per_node 8 -m megadistill train RECIPE" in said
    assert "deepspeed --num_gpus 8 --module megadistill train RECIPE" in said


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("trian", "x"), ("plan", "x"), ("plan", "x", "--nodes", "two"), ("train",)])
def test_a_mistyped_command_is_wrong_input(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits(*arguments) == 2
    assert "usage: megadistill" in capsys.readouterr().err


def test_a_verb_that_ends_well_is_0(export: Callable[[Export], None], capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def export_run(run: Path, output: Path, **options: object) -> int:
        calls.append((run, output, options))
        return 7

    export(export_run)
    assert main([*EXPORT, "--step", "7", "--max-shard-mb", "4"]) == 0
    assert calls == [(Path("run"), Path("out"), {"step": 7, "max_shard_bytes": 4_000_000, "dtype": None})]
    assert "step 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("what, value, way out"), 2),
        (RestartFault("the disk is full"), 3),
        (KeyboardInterrupt(), 3),
        (OperatorFault("step 3: loss is nan"), 4),
        (ValueError("a bug"), 4),
    ],
    ids=["user", "restart", "interrupt", "operator", "bug"],
)
def test_each_fault_has_its_exit_code(
    error: BaseException, code: int, export: Callable[[Export], None], capsys: pytest.CaptureFixture[str]
) -> None:
    export(_raises(error))
    assert main(EXPORT) == code
    said = capsys.readouterr()
    assert not said.out
    assert str(error) in said.err
    assert ("Traceback" in said.err) == (type(error) is ValueError), "only a bug shows where it is"


def test_what_is_wrong_for_all_is_said_once_a_node_and_a_fault_by_every_rank(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadistill.cli.main.SPEAKING_SECONDS", 0.0)

    def said(error: Exception, rank: str, local_rank: str) -> str:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        export(_raises(error))
        assert main(EXPORT) == getattr(error, "exit_code", None)
        return capsys.readouterr().err

    assert said(UserError("no"), rank="8", local_rank="0") == "megadistill: no\n"
    assert said(UserError("no"), rank="9", local_rank="1") == ""
    for fault in (RestartFault("no"), OperatorFault("no")):
        assert said(fault, rank="9", local_rank="1") == "megadistill: rank 9: no\n"


def test_a_step_of_slurm_says_its_rank_itself(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadistill.cli.main.SPEAKING_SECONDS", 0.0)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    export(_raises(RestartFault("no")))
    main(EXPORT)
    assert capsys.readouterr().err == "megadistill: rank 0: no\n", "in a batch script, outside a step"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    main(EXPORT)
    assert capsys.readouterr().err == "megadistill: rank 9: no\n"
    export(_raises(UserError("no")))
    main(EXPORT)
    assert capsys.readouterr().err == "", "said by the node's first rank"


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_a_launcher_may_put_the_rank_before_the_verb(option: str, export: Callable[[Export], None]) -> None:
    export(lambda *arguments, **options: 3)
    assert main([option, *EXPORT]) == 0


def test_steps_to_stop_after_count_from_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "--stop-after", "0"]) == 2
    assert "--stop-after 0" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "at_once"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_fault_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch, code: int, at_once: bool) -> None:
    """Process groups whose peers are gone abort the interpreter's own end, with a code that is none of ours."""
    ended: list[int] = []
    monkeypatch.setattr("megadistill.cli.main.main", lambda: code)
    monkeypatch.setattr("os._exit", ended.append)
    with pytest.raises(SystemExit) as caught:
        entry()
    assert caught.value.code == code
    assert ended == ([code] if at_once else [])


def test_what_the_disk_refuses_is_one_line(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str]
) -> None:
    export(_raises(PermissionError(13, "Permission denied", "/there")))
    assert main(EXPORT) == 4
    assert capsys.readouterr().err == "megadistill: rank 0: [Errno 13] Permission denied: '/there'\n"


def test_a_rank_that_alone_met_wrong_input_speaks(
    export: Callable[[Export], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    export(_raises(RankUserError("rank 1: it is not there")))
    assert main(EXPORT) == 2
    assert capsys.readouterr().err == "megadistill: rank 1: it is not there\n"
