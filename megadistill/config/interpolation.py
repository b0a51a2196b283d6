"""Length of a recipe once its references, `${run.seed}`, are expanded: a few lines may make gigabytes of it."""

import re
from typing import Any

from megadistill.errors import UserError

MAX_EXPANDED = 1 << 20
"""Characters and values of an expanded recipe."""

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NESTED = re.compile(r"\$\{[^{}]*\$\{")


def refuse_expansion(values: Any, source: str) -> None:
    """Refuses values, with their references as they are written, that are too large once expanded.

    Raises:
        UserError: they are larger than `MAX_EXPANDED`, or a reference's name has another reference in it.
    """
    try:
        size = _Sizes(values, source).of(())
    except RecursionError:
        raise UserError(f"{source}: its references (${{key}}) refer to too many others: write the values") from None
    if size > MAX_EXPANDED:
        raise UserError(
            f"{source}: its references (${{key}}) expand to more than {MAX_EXPANDED:,} characters: write the values"
        )


class _Sizes:
    """The expanded size of each value, computed once; no text is built."""

    def __init__(self, values: Any, source: str) -> None:
        self._values, self._source = _with_text_keys(values), source
        self._sizes: dict[tuple[str, ...], int] = {}

    def of(self, path: tuple[str, ...]) -> int:
        """Characters of the texts below a path, and one for each value and reference."""
        if path not in self._sizes:
            self._sizes[path] = 0  # a circle, which OmegaConf refuses
            value, here = self._find(path)
            self._sizes[path] = self.of(here) if here != path else self._size(value, path)
        return self._sizes[path]

    def _size(self, value: Any, path: tuple[str, ...]) -> int:
        if isinstance(value, dict):
            return 1 + sum(self.of((*path, key)) for key in value)
        if not isinstance(value, str):
            return 1
        if _NESTED.search(value):
            raise UserError(f"{self._source}: {'.'.join(path)}: a reference within a reference: write the key itself")
        return 1 + len(value) + sum(self.of(_target(name, path)) for name in _REFERENCE.findall(value))

    def _find(self, path: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
        """The value at a path, and where it is: at a reference to what holds it, if one is on the way."""
        value = self._values
        for length, name in enumerate(path):
            if isinstance(value, dict):
                value = value.get(name)
            else:
                return value, path[:length]
        return value, path


def _with_text_keys(value: Any) -> Any:
    """Nested mappings whose keys are as references spell them; a list is one from its numbers."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    return {str(key): _with_text_keys(child) for key, child in value.items()} if isinstance(value, dict) else value


def _target(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
    """The path that a reference in the value at `path` names; a leading dot is the section that holds the value."""
    levels = len(name) - len(name.lstrip("."))
    above = path[: max(0, len(path) - levels)] if levels else ()
    return (*above, *re.findall(r"[^.\[\]'\"\s]+", name))
