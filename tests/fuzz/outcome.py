"""The outcome of a command on hostile input, and what is wrong with it."""

import unicodedata
from dataclasses import dataclass

EXIT_CODES = (0, 2, 3, 4)
MAX_LINE = 5_000
"""Characters of a line that a command prints about bad input: a value of megabytes is shortened."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and what it printed; or why it has neither."""

    code: int | None
    out: str = ""
    err: str = ""
    ended: str = ""
    """Why there is no exit code: a time limit, or a signal."""

    def complaint(self) -> str | None:
        """A line for what a user would complain about; None: nothing."""
        if self.code is None:
            return self.ended
        if "Traceback (most recent call last)" in self.err + self.out:
            return f"exit {self.code} with a traceback: {_last_line(self.err)}"
        if self.code not in EXIT_CODES:
            return f"exit {self.code}: {_last_line(self.err)}"
        if self.code == 0:
            return self._control_character()
        lines = self.err.splitlines()
        if not lines and self.out.strip():  # the table of doctor, the list of `shards verify`: they have the reasons
            return self._control_character()
        if not lines:
            return f"exit {self.code} without a word"
        if self.code == 2:
            first = next((number for number, line in enumerate(lines) if line.startswith("megadistill:")), None)
            if first is None:
                return f"no line that begins with megadistill: {self.err[-300:]!r}"
            if any(not line.startswith(" ") for line in lines[first + 1 :]):
                return f"more than one line: {self.err[-500:]!r}"
        longest = max(lines, key=len)
        if len(longest) > MAX_LINE:
            return f"a line of {len(longest)} characters: {longest[:200]!r}"
        return self._control_character()

    def _control_character(self) -> str | None:
        for text in (self.err, self.out):
            for where, letter in enumerate(text):
                if unicodedata.category(letter) not in ("Cc", "Cs") or letter in "\n\t\r":
                    continue
                return f"a control character is printed raw: {text[max(0, where - 80) : where + 40]!r}"
        return None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing printed"
