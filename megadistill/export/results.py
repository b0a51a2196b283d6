"""Results of a run for its model card: the metrics of a step, and evaluations in the run folder."""

from pathlib import Path

from megadistill.errors import UserError
from megadistill.evaluate.evaluation import measure_rows, read_evaluations
from megadistill.events import read_lines
from megadistill.export.markdown import basename, escape_md, table

LOGGED = {
    "loss": "loss",
    "kl": "KL",
    "student_ce": "CE",
    "teacher_ce": "CE of the teacher",
    "agreement": "agreement",
    "grad_norm": "gradient norm",
}
"""Key of a line of metrics.jsonl -> heading."""


def results_section(run: Path, step: int) -> str:
    """The metrics of `step` and the tables of `evaluation*.json`; empty where there are none."""
    line = next((line for line in read_lines(run / "metrics.jsonl") if line.get("step") == step), {})
    metrics = {heading: f"{line[key]:.4f}" for key, heading in LOGGED.items() if isinstance(line.get(key), float)}
    parts = []
    if metrics:
        parts.append(f"At step {step:,}, means over that step's tokens of the training text, in nats:")
        parts.append(table(list(metrics), [list(metrics.values())]))
    for path in sorted(run.glob("evaluation*.json")):
        try:
            evaluations = read_evaluations(path)
        except UserError:  # of another version, or another tool
            continue
        heading, *rows = measure_rows("model", [(basename(each.model), each) for each in evaluations], missing="")
        parts.append(f"Measured on held-out text ({escape_md(path.stem)}; CE, KL and JSD in nats):")
        parts.append(table(heading, rows))
    return "\n\n".join(parts)
