"""The exponential of compiled kernels on a CPU, and the terms of a KL: inside the loop, in place of calls.

Inductor calls Sleef's function for each vector of numbers, with every register saved around it, and takes e^x - 1 for
`expm1`, which near 0 is all rounding error. These are as exact as Sleef's, and cost half. On a device, in float64 and
in eager arithmetic both are torch's own.

They are for functions that are short: Inductor cuts one of many operations in two, with a matrix between the parts.
Constants stand in the code: a number of the module would be one more argument of a kernel, read for each vector.
"""

from typing import Any

import torch
from torch import Tensor

INDUCTOR_OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
"""Options of `torch.compile`: a · b + c is one instruction on a CPU, without which a polynomial is slow."""


def inlined_exp(x: Tensor) -> Tensor:
    """e^x of numbers that are at most some rounding errors above 0. -inf, and what underflows, is 0."""
    if not _is_inlined(x):
        return x.exp()
    x = x.clamp_min(-88.02969)  # -127 ln 2: below it there is no normal number
    n = (x * 1.4426950408889634).round()
    x = x - n * 0.693359375 + n * 2.12194440e-4  # x - n ln 2: ln 2 in two parts, of which n times the first is exact
    value = x * 1.9875691500e-4 + 1.3981999507e-3  # of |x| < ln 2 / 2: the polynomial of Cephes's expf
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        value = value * x + coefficient
    power_of_2 = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return value * power_of_2


def inlined_kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """`kl_terms`."""
    if not _is_inlined(d):
        return kl_terms(p, q, d)
    series = d * (-1 / 362880) + 1 / 40320  # (d + e^-d - 1) / d² up to d⁷: what is left out is below 2^-24 of it
    for coefficient in (-1 / 5040, 1 / 720, -1 / 120, 1 / 24, -1 / 6, 1 / 2):
        series = series * d + coefficient
    return torch.where(d.abs() < 0.5, p * (series * d * d), p * d + (q - p))


def kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p (d + e^-d - 1) with d = ln p - ln q: over the whole vocabulary that adds Σ q - Σ p = 0 to Σ p d.

    But no term is negative, and nothing cancels when p and q are close. Where q is far likelier, e^-d would overflow,
    and the plain sum is exact enough.
    """
    return torch.where(d > -1, p * (d + torch.expm1(-d)), p * d + (q - p))


def _is_inlined(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.float32
