"""A toy divergence, as a change of three files of a copy of the package, and the guards that it must meet there.

The toy is β KL(p_t ‖ p_s) + (1-β) KL(p_s ‖ p_t): infinite where the teacher gives 0, with a parameter of its own.
"""

import logging
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megadistill.config.keys import keys
from megadistill.config.load import validate_recipe
from megadistill.config.recipe import LossSection, Recipe
from megadistill.divergence import Divergence, DivergenceKind
from megadistill.errors import UserError
from megadistill.export import model_card
from megadistill.loss import VocabSlice
from megadistill.models.families import load_config
from megadistill.train.setup import preflight
from tests.paths import ROOT
from tests.unit.loss.problems import TOLERANCE, assert_same, problem, run, truth
from tests.unit.train.cases import recipe
from tests.unit.train.telemetry.test_metrics import _log

CHANGES = {
    "divergence.py": (
        '    TVD = "tvd"',
        """    JEFFREYS = (
        "jeffreys",
        DivergenceSpec(
            "Jeffreys divergence",
            Parameter("beta", "β", "the weight of forward KL", default=0.25, includes_one=False),
            finite_at_zero=False,
            limits=((0.0, "reverse_kl"),),
        ),
    )
""",
    ),
    "loss/reference.py": (
        "    log_m = torch.logaddexp(",
        """    if kind.value == "jeffreys":
        return share * kl(log_p_t, log_p_s) + (1 - share) * kl(log_p_s, log_p_t)
""",
    ),
    "loss/pointwise.py": (
        "    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)\n",
        """    if kind.value == "jeffreys":
        value = share * kl_terms(p_t, p_s, d.clamp_min(-MAX_LOG_RATIO)) + (1 - share) * kl_terms(p_s, p_t, -d)
        return value, -share * d.clamp_max(80).exp() - (1 - share) * d
""",
    ),
}
"""File of the package -> (line that the addition precedes, addition)."""


def changed_package(folder: Path) -> None:
    """A copy of the package in `folder`, with the toy."""
    shutil.copytree(ROOT / "megadistill", folder / "megadistill", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (line, addition) in CHANGES.items():
        file = folder / "megadistill" / name
        before, anchor, after = file.read_text(encoding="utf-8").partition(line)
        assert anchor, f"{name} has no line {line!r}"
        file.write_text(before + addition + anchor + after, encoding="utf-8")


def meet_every_guard() -> None:
    """Recipe, its keys' page, preflight, the loss against its reference, a log line, the model card."""
    kind = DivergenceKind("jeffreys")
    plain = recipe(Path("manifest.json"), Path("run"), teacher=Path("teacher")).snapshot()

    def with_loss(**loss: object) -> Recipe:
        return validate_recipe({**plain, "loss": {"divergence": "jeffreys", **loss}}, source="recipe")

    def section(**loss: object) -> LossSection:
        return with_loss(**loss).loss

    assert section().divergence is kind
    refused: list[dict[str, object]] = [{"beta": 1.0}, {"beta": -0.1}, {"alpha": 0.5}, {"targets": {}}]
    for wrong in refused:
        with pytest.raises(
            UserError,
            match=r"the weight of forward KL, from 0 to less than 1|at least 0.0, found -0.1|skew_kl|jeffreys",
        ):
            section(**wrong)
    by_name = {key.name: key for key in keys()}
    assert "jeffreys" in by_name["loss.divergence"].type
    assert "jeffreys: the weight of forward KL" in by_name["loss.beta"].meaning

    for loss in (section(), section(beta=0.5), section(beta=0.0)):
        with pytest.raises(UserError, match="infinite where the teacher gives no probability"):
            preflight.check_divergence(loss, torch.tensor([0, -1]))

    p, vocab = problem(1), VocabSlice.contiguous(0, 24, 21)
    for parameter in (None, 0.7):
        divergence = Divergence(kind, temperature=2.0, parameter=parameter, ce_weight=0.3)
        for dtype, tolerance in TOLERANCE.items():
            assert_same(run(p.cast(dtype), divergence, vocab=vocab), truth(p, divergence), tolerance)

    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        _log(Path(folder), range(1, 2), loss=section())
    assert "Jeffreys divergence, β 0.5" in model_card._objective(
        with_loss(beta=0.5), load_config(plain["student"]["config"], what="student.config")
    )
