"""Packets of hidden states: int64 numbers (the header), then bytes; and the signal that is made of one.

Legend: B sequences, S tokens of a sequence, E width.

Hidden states travel as they are computed (bfloat16 or float32), or in 8 bits: float8 e4m3 with one float32 scale a
token, so that the largest number of each token is the largest that the format has. Half the bytes of bfloat16; the
error is the format's, up to 1/16 of each number (three bits of mantissa), and below 2^-9 of the token's largest number
divided by 448.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.errors import OperatorFault
from megadistill.teacher.float8 import FLOAT8, to_float8
from megadistill.types import TeacherSignal

INT64_BYTES = torch.int64.itemsize
"""Bytes of one number of a header."""


def pack(header: Tensor, *payload: Tensor, out: Tensor | None = None) -> Tensor:
    """[bytes] uint8: the int64 numbers of `header`, then the bytes of `payload`; in `out` where it is given."""
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in (header, *payload)], out=out)


def unpack(packet: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
    """The header [numbers] int64, copied to be aligned, and the payload [bytes] uint8 of a packet."""
    end = INT64_BYTES * numbers
    return packet[:end].clone().view(torch.int64), packet[end:]


def checked_signal(hidden_BSE: Tensor, slots_B: Tensor, digests_B: Tensor) -> TeacherSignal:
    """The signal of a micro-batch. A host-device sync.

    Raises:
        OperatorFault: the hidden states are not finite.
    """
    # One number instead of B·S·E flags: a NaN or an infinity stays one in the sum. One copy brings it and the tags.
    finite = hidden_BSE.sum(dtype=torch.float32).isfinite().long()
    parts = [digests_B, finite.unsqueeze(0)]
    arrived = slots_B.device == digests_B.device  # with the hidden states; else they are this rank's, on the host
    tags = torch.cat([slots_B, *parts] if arrived else parts).cpu()
    slots, digests = tags[: len(slots_B)] if arrived else slots_B, tags[-1 - len(digests_B) : -1]
    if not tags[-1]:
        raise OperatorFault(
            f"the teacher's hidden states are not finite in slots {slots.tolist()}: check its weights and its dtype "
            f"({hidden_BSE.dtype}) before starting again"
        )
    return TeacherSignal(hidden=hidden_BSE.flatten(0, 1), slots=slots, digests=digests)


@dataclass(frozen=True)
class ActivationCodec:
    """The packet of an answer: slots [B], digests [B], hidden states [B, S, E]; with `float8` their scales [B, S]."""

    width: int
    """E."""
    dtype: torch.dtype
    """The teacher's precision."""
    float8: bool = False

    def bytes(self, B: int, S: int) -> int:
        a_token = self.width + 4 if self.float8 else self.width * self.dtype.itemsize
        return 2 * INT64_BYTES * B + B * S * a_token

    def encode(self, hidden_BSE: Tensor, slots_B: Tensor, digests_B: Tensor) -> Tensor:
        """[bytes] uint8."""
        header = torch.cat([slots_B, digests_B])
        if not self.float8:
            return pack(header, hidden_BSE)
        rounded_BSE, scales_BS1 = to_float8(hidden_BSE)
        return pack(header, scales_BS1, rounded_BSE)

    def decode(self, answer: Tensor, B: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, S, E] in the teacher's dtype, slots [B], digests [B]."""
        header, payload = unpack(answer, 2 * B)
        slots_B, digests_B, shape = header[:B], header[B:], (B, S, self.width)
        if not self.float8:
            return payload.view(self.dtype).view(shape), slots_B, digests_B
        scales_BS1 = payload[: 4 * B * S].view(torch.float32).view(B, S, 1)
        hidden_BSE = payload[4 * B * S :].view(FLOAT8).view(shape).float() * scales_BS1
        return hidden_BSE.to(self.dtype), slots_B, digests_B
