"""Times of what a rank does: of the parts of every step, and timelines of a few steps with spans on each rank.

The packages above mark parts (`timed`) and spans of computing, waiting and sending (`span`). The training loop starts a
`Stopwatch` for each step; `train.telemetry` and `teacher` start a `Recorder`, whose recordings are stored and drawn.
"""

from megadistill.timeline.recorder import annotated, follow, recording, span
from megadistill.timeline.spans import COMPUTE, DATA, HOST, SAVE, SEND, WAIT, MessageId
from megadistill.timeline.stopwatch import Part, timed

__all__ = [
    "COMPUTE",
    "DATA",
    "HOST",
    "SAVE",
    "SEND",
    "WAIT",
    "MessageId",
    "Part",
    "annotated",
    "follow",
    "recording",
    "span",
    "timed",
]
