"""Room `timeline`: who computes, waits and sends in a few steps: recorded, stored, drawn. It knows no other room.

Below the rooms that it looks at: they say what they do (`span`), and somebody above them turns a `Recorder` on.
"""

from megadistill.timeline.recorder import follow, message_span, recording, span
from megadistill.timeline.spans import COMPUTE, DATA, HOST, SAVE, SEND, WAIT

__all__ = ["COMPUTE", "DATA", "HOST", "SAVE", "SEND", "WAIT", "follow", "message_span", "recording", "span"]
