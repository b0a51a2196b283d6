"""float8 on the wire against float64: what an accelerator packs is what a CPU packs, by the same operations.

e4m3 has 4 bits of mantissa, the leading one included: a number is off by 2^-4 of itself at most, and below the smallest
normal one, 2^-6, by half of the spacing 2^-9. The scale of a token is its largest number / 448.
"""

import pytest
import torch
from torch import Tensor

from megadistill.teacher.codec import ActivationCodec

E = 64
DTYPES = [torch.float32, torch.bfloat16]
LARGEST = 448


def _round_trip(hidden_BSE: Tensor, dtype: torch.dtype) -> Tensor:
    B, S, _ = hidden_BSE.shape
    codec = ActivationCodec(E, dtype, float8=True)
    packet = codec.encode(hidden_BSE, torch.arange(B), torch.arange(B))
    assert packet.numel() == codec.bytes(B, S)
    return codec.decode(packet, B, S)[0]


def _hidden(dtype: torch.dtype) -> Tensor:
    """Tokens from 1e-6 to 1e6; in each, numbers down to a millionth of the largest, some of them zero."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(3, 7, E, generator=generator).mul(-14).exp()
    sizes = torch.logspace(-6, 6, 21).view(3, 7, 1)
    hidden = torch.randn(3, 7, E, generator=generator) * spread * sizes
    hidden[:, :, 5] = 0
    return hidden.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_number_is_off_by_the_formats_rounding(dtype: torch.dtype) -> None:
    """The receiver rounds to the dtype of the teacher, which adds its own."""
    hidden = _hidden(dtype)
    decoded, true = _round_trip(hidden, dtype), hidden.double()
    assert decoded.dtype == dtype
    received = 2**-8 if dtype == torch.bfloat16 else 2**-22
    largest = true.abs().amax(dim=-1, keepdim=True)
    bound = torch.maximum(2**-4 * true.abs(), largest / LARGEST * 2**-10)
    error = (decoded.double() - true).abs()
    assert (error <= bound * (1 + received) + received * true.abs()).all()
    assert (error > bound / 2).any(), "the bound is not slack"
    assert not decoded[:, :, 5].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_of_a_token_arrives_as_it_is(dtype: torch.dtype) -> None:
    """It is scaled to the largest of the format, whatever way the scale is rounded: never beyond it, to NaN."""
    hidden = torch.rand(1, 4096, E, generator=torch.Generator().manual_seed(2)).to(dtype)
    decoded, (largest, place) = _round_trip(hidden, dtype), hidden.max(dim=-1, keepdim=True)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded.gather(-1, place), largest, rtol=2**-22 if dtype == torch.float32 else 0, atol=0)


def test_a_token_of_zeros_arrives_as_zeros() -> None:
    assert not _round_trip(torch.zeros(1, 2, E), torch.float32).any()
