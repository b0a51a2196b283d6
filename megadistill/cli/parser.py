"""The argument parser of the commands: a mistake is one line that says what to type."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megadistill.errors import UserError, nearest, nearest_of

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", flags=re.DOTALL)
"""KEY=VALUE."""

_OTHER_COMMANDS = {
    other: command
    for command, others in {
        "train": ("run", "distill", "finetune", "fit", "pretrain", "launch", "resume"),
        "evaluate": ("eval", "test", "validate", "perplexity"),
        "sample": ("chat", "infer", "inference", "predict", "complete"),
        "export": ("convert", "save", "merge"),
        "tokenize": ("preprocess", "prepare", "data", "pack"),
        "average": ("soup", "swa", "ema"),
        "doctor": ("check", "validate-config", "diagnose"),
        "plan": ("estimate", "memory"),
        "timeline": ("profile", "trace"),
        "track": ("wandb", "mlflow", "log"),
        "--help": ("help", "commands"),
    }.items()
    for other in others
}
"""A command of other tools -> ours."""

_RECIPE_OPTIONS = ("--recipe", "--config", "-c", "--cfg", "--yaml", "--config_file", "--config-file", "--config_path")

_NUMBERS = {"int": "an integer", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `UserError`s."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse. A command without actions has all its arguments here: its mistakes are found first."""
        if args is not None and self._subparsers is None:
            self._refuse_mistakes(list(args))
        options, unexpected = super().parse_known_args(args, namespace)
        if unexpected:
            raise UserError(f"{unexpected[0]}: {self.prog} takes no such argument (`{self.prog} --help` shows them)")
        return options, unexpected

    def error(self, message: str) -> NoReturn:
        """Refuses what argparse refuses.

        Raises:
            UserError: always.
        """
        of_option = re.fullmatch(r"argument (\S+): (.*)", message, flags=re.DOTALL)
        if of_option is not None:
            name, reason = of_option.groups()
            wrong_type = re.fullmatch(r"invalid (\w+) value: '(.*)'", reason, flags=re.DOTALL)
            if wrong_type is not None:
                reason = f"{wrong_type[2]}: give {_NUMBERS.get(wrong_type[1], wrong_type[1])}"
            message = f"{name}{':' if reason.startswith(('expected', 'not allowed')) else ''} {reason}"
        else:
            message = message.replace("the following arguments are required:", "missing:")
            if self._subparsers is not None:
                message += f", one of {', '.join(_names_of(self))}"
        raise UserError(f"{message} (`{self.prog} --help` shows the arguments, and examples)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(each) for each in action.choices]
        if not isinstance(action, argparse._SubParsersAction):
            what = "/".join(action.option_strings)
            raise UserError(f"{what} {value}: give one of {', '.join(known)}{nearest(str(value), known)}")
        close = _OTHER_COMMANDS.get(str(value).lower(), "")
        if close not in (*known, *self._option_string_actions):
            close = nearest_of(str(value), known) or ""
        if close:
            raise UserError(f"no command `{self.prog} {value}`; did you mean `{self.prog} {close}`?")
        path = Path(str(value))
        if path.suffix in (".yaml", ".yml"):
            raise UserError(f"no command: to train, `{self.prog} train {value}` (`{self.prog} --help` lists others)")
        if path.is_dir() and "report" in known:
            raise UserError(f"no command: for a run folder, `{self.prog} report {value}` (`{self.prog} --help`)")
        raise UserError(f"no command `{self.prog} {value}`: there are {', '.join(known)}")

    def _refuse_mistakes(self, arguments: list[str]) -> None:
        """Refuses unknown options, and overrides of a recipe that are not written as `--set KEY=VALUE`."""
        overrides = "--set" in self._option_string_actions
        rest = iter(range(len(arguments)))
        for number in rest:
            argument = arguments[number]
            if argument == "--":
                return
            if re.match(r"-[A-Za-z-]", argument) is None:
                if overrides and _OVERRIDE.fullmatch(argument):
                    raise UserError(f"{argument} without a --set of its own: write {_set(argument)}")
                continue
            name, equals, value = argument.partition("=")
            actions = [
                action for known, action in self._option_string_actions.items()
                if known == name or (name.startswith("--") and known.startswith(name))
            ]  # fmt: skip
            if not actions:
                raise UserError(self._unknown_option(name, value if equals else _next(arguments, number)))
            action = self._option_string_actions.get(name, actions[0])
            if overrides and action is self._option_string_actions["--set"]:
                _refuse_bad_override([*([value] if equals else []), *_until_option(arguments[number + 1 :])])
            if action.nargs is None and not equals:
                next(rest, None)

    def _unknown_option(self, name: str, value: str) -> str:
        if "--set" in self._option_string_actions:
            if name in _RECIPE_OPTIONS:
                return f"{name}: the recipe has no option: write {self.prog} {shlex.quote(value or 'RECIPE')}"
            from megadistill.config.other_names import key_of_option

            solution = key_of_option(name)
            if solution is not None and solution.key is not None:
                return f"{name}: {self.prog} has no such option, a recipe has the key: write " + _set(
                    f"{solution.key}={value or 'VALUE'}"
                )
            if solution is not None:
                return f"{name}: {self.prog} has no such option{solution.text}"
        known = sorted(known for known in self._option_string_actions if known.startswith("--"))
        return f"{name}: {self.prog} has no such option{nearest(name, known) or ': it has ' + ', '.join(known)}"


def _names_of(parser: argparse.ArgumentParser) -> list[str]:
    """The actions of a command, or the commands."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [str(name) for group in groups for name in group.choices]


def _refuse_bad_override(tokens: Sequence[str]) -> None:
    """Refuses `--set KEY VALUE`, `--set KEY = VALUE` and the like. `tokens`: all up to the next option."""
    if not tokens:
        return
    key, equals, value = tokens[0].partition("=")
    several = re.split(r"[\s,;]+(?=[a-z_]+(?:\.[a-z_0-9]+)+=)", tokens[0])
    if len(several) > 1 and all(_OVERRIDE.fullmatch(each) for each in several):
        raise UserError(f"--set {tokens[0]}: each key has a --set of its own: write {' '.join(map(_set, several))}")
    if not equals and (colon := re.fullmatch(r"([\w.]+): *(.+)", key)) is not None:
        raise UserError(f"--set {key}: write {_set(f'{colon[1]}={colon[2]}')}")
    if not equals and re.fullmatch(r"[\w.-]+", key) is None:
        raise UserError(f"--set {key}: give KEY=VALUE, as in --set train.steps=100")
    after = [token for token in tokens[1:] if token != "="]
    separate = len(tokens) > 1 and tokens[1].startswith("=")
    is_recipe = bool(after) and (after[0].endswith((".yaml", ".yml")) or Path(after[0]).exists())
    if value or (equals and not separate and (not after or is_recipe)):
        return
    if after and (separate or not is_recipe) and "=" not in after[0][1:]:
        given = " ".join(tokens[: 3 if tokens[1] == "=" else 2])
        override = f"{key}={after[0].removeprefix('=')}"
        raise UserError(f"--set {given}: write {_set(override)}")
    raise UserError(f"--set {key}: a value is missing: write {_set(f'{key}=VALUE')}")


def _until_option(arguments: Sequence[str]) -> list[str]:
    end = next((n for n, each in enumerate(arguments) if each.startswith("--")), len(arguments))
    return list(arguments[:end])


def _next(arguments: Sequence[str], number: int) -> str:
    """The value that follows an option."""
    after = arguments[number + 1 : number + 2]
    return after[0] if after and not after[0].startswith("--") else ""


def _set(override: str) -> str:
    return f"--set {shlex.quote(override)}"
