"""Room `teacher`: how hidden states cross from the teacher's ranks to the student's. It knows no ranks.

Legend: B sequences, S tokens of a sequence, E width.

As they are computed (bfloat16 or float32), or in 8 bits: float8 e4m3 with one float32 scale a token, so that the
largest number of each token is the largest that the format has. Half the bytes of bfloat16; the error is the format's,
up to 1/16 of each number (three bits of mantissa), and below 2^-9 of the token's largest number divided by 448.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Wire:
    """An answer: slots [B], digests [B], hidden states [B, S, E]; with `float8` their scales [B, S]."""

    width: int
    """E."""
    dtype: torch.dtype
    """Of the teacher."""
    float8: bool = False

    def bytes(self, B: int, S: int) -> int:
        a_token = self.width + 4 if self.float8 else self.width * self.dtype.itemsize
        return 16 * B + B * S * a_token

    def pack(self, hidden_BSE: Tensor, slots_B: Tensor, digests_B: Tensor) -> Tensor:
        """[bytes] uint8."""
        parts = [slots_B, digests_B]
        if self.float8:
            scales_BS1 = hidden_BSE.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-30) / _LARGEST
            parts += [scales_BS1, (hidden_BSE.float() / scales_BS1).to(FLOAT8)]
        else:
            parts.append(hidden_BSE)
        return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])

    def unpack(self, answer: Tensor, B: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, S, E] in the teacher's dtype, slots [B], digests [B]."""
        slots_B, digests_B = answer[: 8 * B].view(torch.int64), answer[8 * B : 16 * B].view(torch.int64)
        rest, shape = answer[16 * B :], (B, S, self.width)
        if not self.float8:
            return rest.view(self.dtype).view(shape), slots_B, digests_B
        scales_BS1 = rest[: 4 * B * S].view(torch.float32).view(B, S, 1)
        hidden_BSE = rest[4 * B * S :].view(FLOAT8).view(shape).float() * scales_BS1
        return hidden_BSE.to(self.dtype), slots_B, digests_B
