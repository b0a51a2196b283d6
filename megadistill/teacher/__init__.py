"""The frozen teacher: one stage of its layers a rank, hidden states as its signal. It never meets the student."""

from megadistill.teacher.codec import Wire
from megadistill.teacher.disaggregated import RemoteTeacher, RequestForm, TeacherServer
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows, unknown_bias

__all__ = [
    "RemoteTeacher",
    "RequestForm",
    "TeacherPipeline",
    "TeacherServer",
    "TeacherStage",
    "Wire",
    "head_rows",
    "unknown_bias",
]
