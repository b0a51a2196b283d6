"""Each contender of the benchmark of the loss computes the benchmark's problem: value, dX and dW, against float64."""

import pytest

from benchmarks.contenders import FORWARD_KL, LABELS, Inputs, NeedsAcceleratorError, Problem, Shape
from benchmarks.loss import errors_to

CASES = [
    pytest.param(problem, name, id=f"{kind}: {name}")
    for kind, problem in (("forward KL", FORWARD_KL), ("labels", LABELS))
    for name in problem.contenders
    if "compile" not in name  # the same arithmetic, after seconds of a C++ compiler
]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_a_contender_computes_the_problem(problem: Problem, name: str) -> None:
    inputs = Inputs.random(Shape(tokens=9, vocab=130, student_width=6, teacher_width=10))
    try:
        found = problem.contenders[name](inputs)
    except ImportError as missing:
        pytest.skip(f"{missing}: pip install -e '.[oracles]', and trl and cut-cross-entropy")
    except NeedsAcceleratorError as missing:
        pytest.skip(str(missing))
    assert max(errors_to(found, problem.truth(inputs))) < 3e-6
