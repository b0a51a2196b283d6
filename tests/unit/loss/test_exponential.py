"""The exponential and the terms of a KL that compiled kernels have on a CPU, against float64."""

import math
import os
import shutil

import pytest
import torch

from megadistill.loss import exponential, pointwise

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: install g++, or set CXX"
)


def test_the_exponential_is_exact_to_the_last_bits() -> None:
    x = torch.cat([-torch.linspace(0, 87.6, 10_007), torch.linspace(0, 1e-5, 5), torch.full((3,), -0.0)])
    values = pointwise.compiled(exponential.inlined_exp)(x)
    torch.testing.assert_close(values.double(), x.double().exp(), rtol=2.0**-23, atol=0.0)


def test_ids_without_probability_have_none() -> None:
    x = torch.tensor([-math.inf, -1e30, -1000.0, -104.0, -88.1])
    assert pointwise.compiled(exponential.inlined_exp)(x).tolist() == [0.0] * 5
    assert math.isnan(pointwise.compiled(exponential.inlined_exp)(torch.full((5,), math.nan))[0])


def test_no_term_of_a_kl_cancels_where_student_and_teacher_are_close() -> None:
    """e^-d - 1 by subtraction would be wrong by all of it from |d| = 1e-4 down."""
    magnitude = torch.logspace(-7, math.log10(0.49), 1000)
    d = torch.cat([magnitude, -magnitude])
    p = torch.full_like(d, 0.01)
    terms = pointwise.compiled(exponential.inlined_kl_terms)(p, (p.double() * (-d.double()).exp()).float(), d)
    expected = p.double() * (d.double() + torch.expm1(-d.double()))
    assert (terms >= 0).all()
    # float64's own d + (e^-d - 1) loses 2^-53 / d of its digits.
    torch.testing.assert_close(
        terms[magnitude.repeat(2) > 1e-4].double(), expected[magnitude.repeat(2) > 1e-4], rtol=4 * 2.0**-23, atol=0.0
    )


def test_far_terms_are_those_of_the_plain_sum() -> None:
    d = torch.tensor([-1000.0, -30.0, -3.0, 0.7, 30.0, 80.0])
    p, q = torch.full_like(d, 0.02), torch.full_like(d, 0.5)
    terms = pointwise.compiled(exponential.inlined_kl_terms)(p, q, d)
    torch.testing.assert_close(terms, p * d + (q - p))
