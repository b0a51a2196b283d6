"""Timelines of a few steps: spans of computing, waiting and sending on each rank, recorded, stored and drawn.

The packages above mark their spans (`span`); `train.telemetry` and `teacher` start a `Recorder`.
"""

from megadistill.timeline.recorder import follow, recording, span
from megadistill.timeline.spans import COMPUTE, DATA, HOST, SAVE, SEND, WAIT, MessageId

__all__ = ["COMPUTE", "DATA", "HOST", "SAVE", "SEND", "WAIT", "MessageId", "follow", "recording", "span"]
