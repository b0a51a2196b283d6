"""The command line: help texts, exit codes, former names, and which rank of a node prints."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megadistill import __version__
from megadistill.cli.main import RENAMED, main, run_command
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError

COMMANDS = (
    *("init", "tokenize", "shards", "train", "doctor", "store-targets", "generate", "export", "prune", "evaluate"),
    *("sample", "lm-eval", "report", "plan", "timeline", "config-keys", "vocab-map", "models", "average", "follow"),
)
EXPORT = ("export", "run", "--output", "out")

Export = Callable[..., int]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[[Export], None]:
    """Replaces the function that the command `export` calls."""

    def replace(function: Export) -> None:
        module: Any = ModuleType("megadistill.export.export_run")
        module.export_run = function
        monkeypatch.setitem(sys.modules, "megadistill.export.export_run", module)

    return replace


def _raises(error: BaseException) -> Export:
    def export_run(*arguments: object, **options: object) -> int:
        raise error

    return export_run


def _exits(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits("--help") == 0
    printed = capsys.readouterr().out
    for part in (*COMMANDS, "exit codes", "--version"):
        assert part in printed
    assert "local_rank" not in printed, "a launcher's option is not for people"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_the_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exits(command, "--help") == 0
    printed = capsys.readouterr().out
    assert f"usage: megadistill {command} " in printed
    assert "exit codes: 0 " in printed
    assert f"megadistill {command} " in printed.partition("options:")[2], "an example"
    assert "None" not in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal_and_its_commands_can_be_copied(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed(columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        assert _exits(command, "--help") == 0
        return capsys.readouterr().out

    narrow, wide = printed(80), printed(200)
    assert max(map(len, narrow.splitlines())) <= 80
    for text in (narrow, wide):
        assert not re.search(r"\\\n(?! +--)", text), "a line goes on before an option"
    unbroken = [" ".join(re.sub(r" \\\n *", " ", text.partition("options:")[2]).split()) for text in (narrow, wide)]
    assert unbroken[0] == unbroken[1]


def test_the_help_of_train_shows_each_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits("train", "--help") == 0
    printed = capsys.readouterr().out
    assert "torchrun --nproc_per_node 8 -m megadistill train RECIPE" in printed
    assert "deepspeed --num_gpus 8 --module megadistill train RECIPE" in printed


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exits("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_without_a_command_the_help_is_printed_and_the_code_is_that_of_wrong_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command([]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    for part in ("usage: megadistill", *COMMANDS):
        assert part in printed.err


def test_a_command_that_succeeds_exits_with_0(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def export_run(run: Path, output: Path, **options: object) -> int:
        calls.append((run, output, options))
        return 7

    export(export_run)
    assert run_command([*EXPORT, "--step", "7", "--max-shard-mb", "4"]) == 0
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
    assert run_command(EXPORT) == code
    printed = capsys.readouterr()
    assert not printed.out
    assert str(error) in printed.err
    assert ("Traceback" in printed.err) == (type(error) is ValueError), "only a bug shows where it is"


def test_an_error_of_all_ranks_is_printed_once_a_node_and_a_fault_by_every_rank(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadistill.cli.main.EXIT_DELAY_SECONDS", 0.0)

    def printed(error: Exception, rank: str, local_rank: str) -> str:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        export(_raises(error))
        assert run_command(EXPORT) == getattr(error, "exit_code", None)
        return capsys.readouterr().err

    assert printed(UserError("no"), rank="8", local_rank="0") == "megadistill: no\n"
    assert printed(UserError("no"), rank="9", local_rank="1") == ""
    for fault in (RestartFault("no"), OperatorFault("no")):
        assert printed(fault, rank="9", local_rank="1").endswith(" ERROR rank 9 megadistill.cli.main: no\n")


def test_the_rank_of_a_slurm_step_is_read_from_slurm(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadistill.cli.main.EXIT_DELAY_SECONDS", 0.0)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    export(_raises(RestartFault("no")))
    run_command(EXPORT)
    assert " ERROR rank 0 " in capsys.readouterr().err, "in a batch script, outside a step"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    run_command(EXPORT)
    assert capsys.readouterr().err.endswith(" ERROR rank 9 megadistill.cli.main: no\n")
    export(_raises(UserError("no")))
    run_command(EXPORT)
    assert capsys.readouterr().err == "", "printed by the node's first rank"


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_a_launcher_may_put_the_rank_before_the_command(option: str, export: Callable[[Export], None]) -> None:
    export(lambda *arguments, **options: 3)
    assert run_command([option, *EXPORT]) == 0


def test_steps_to_stop_after_count_from_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "recipe.yaml", "--stop-after", "0"]) == 2
    assert "--stop-after 0" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "at_once"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_fault_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch, code: int, at_once: bool) -> None:
    """Process groups whose peers are gone abort the interpreter's own end, with a code that is none of ours."""
    ended: list[int] = []
    monkeypatch.setattr("megadistill.cli.main.run_command", lambda arguments, interrupts: code)
    monkeypatch.setattr("megadistill.cli.main.Interrupts.handle", lambda interrupts: None)
    monkeypatch.setattr("os._exit", ended.append)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert ended == ([code] if at_once else [])


def test_an_error_of_the_disk_is_one_line(export: Callable[[Export], None], capsys: pytest.CaptureFixture[str]) -> None:
    export(_raises(PermissionError(13, "Permission denied", "/there")))
    assert run_command(EXPORT) == 4
    (line,) = capsys.readouterr().err.splitlines()
    way_out = "change the permissions, or name another place"
    assert line.endswith(f" ERROR rank 0 megadistill.cli.main: /there: Permission denied: {way_out}")


def test_an_error_of_one_rank_is_printed_by_it(
    export: Callable[[Export], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    export(_raises(RankUserError("rank 1: it is not there")))
    assert run_command(EXPORT) == 2
    assert capsys.readouterr().err == "megadistill: rank 1: it is not there\n"


def test_an_error_that_another_rank_prints_is_not_printed(
    export: Callable[[Export], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadistill.cli.main.EXIT_DELAY_SECONDS", 0.0)
    error = RankUserError("rank 1: it is not there")
    error.prints = False
    export(_raises(error))
    assert run_command(EXPORT) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("former", "now"), RENAMED.items())
def test_a_former_command_name_is_refused_with_the_new_one(
    former: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["--local_rank", "0", former, "recipe.yaml", "--output", "x"]) == 2
    assert capsys.readouterr().err == f"megadistill: the command {former} is now {now}: use the new name\n"
    assert run_command([former]) == 2
    assert now in COMMANDS
    assert former not in COMMANDS
