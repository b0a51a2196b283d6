"""Room `export`: what a run came to, for its model card: its last step's numbers, and evaluations beside it."""

import json
from pathlib import Path

from megadistill.events import read_lines
from megadistill.export.markdown import last_name, plain, table

LOGGED = {
    "loss": "loss",
    "kl": "KL",
    "student_ce": "CE",
    "teacher_ce": "CE of the teacher",
    "agreement": "agreement",
    "grad_norm": "gradient norm",
}
"""Of a line of metrics.jsonl."""
EVALUATED = {
    "tokens": ("tokens", "{:,}"),
    "cross_entropy": ("CE", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "kl": ("KL", "{:.4f}"),
    "jsd": ("JSD", "{:.4f}"),
    "agreement": ("agreement", "{:.1%}"),
    "acceptance": ("acceptance", "{:.1%}"),
    "calibration_error": ("calibration error", "{:.2%}"),
}
"""Of a model in the JSON of `megadistill evaluate`: its heading, and how it is written."""
MAX_EVALUATION_BYTES = 16 << 20


def came_to(run: Path, step: int) -> str:
    """The numbers of `step`, and the tables of `evaluation*.json` and `exports/step-….json`; nothing where none are."""
    line = next((line for line in read_lines(run / "metrics.jsonl") if line.get("step") == step), {})
    numbers = {head: f"{line[key]:.4f}" for key, head in LOGGED.items() if isinstance(line.get(key), float)}
    parts = []
    if numbers:
        parts.append(f"At step {step:,}, means over that step's tokens of the training text, in nats:")
        parts.append(table([list(numbers), list(numbers.values())]))
    for path in [*sorted(run.glob("evaluation*.json")), run / "exports" / f"step-{step:08d}.json"]:
        found = _evaluation(path)
        if found:
            parts += [f"Measured on held-out text ({plain(path.stem)}; CE, KL and JSD in nats):", found]
    return "\n\n".join(parts)


def _evaluation(path: Path) -> str:
    """What `megadistill evaluate --json` wrote, as a table; nothing where the file is none of its."""
    try:
        with open(path, "rb") as file:
            models = json.loads(file.read(MAX_EVALUATION_BYTES))
        names = [last_name(model["model"]) for model in models]
        numbers = [{key: model.get(key) for key in EVALUATED} for model in models]
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return ""
    shown = [key for key in EVALUATED if any(_is_number(each[key]) for each in numbers)]
    lines = [["model", *(EVALUATED[key][0] for key in shown)]]
    for name, each in zip(names, numbers, strict=True):
        lines.append([name, *(EVALUATED[key][1].format(each[key]) if _is_number(each[key]) else "" for key in shown)])
    return table(lines) if shown else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
