"""The frozen teacher: a stage of its layers on each rank, hidden states as its signal."""

from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec, TeacherServer
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows, unknown_bias

__all__ = [
    "ActivationCodec",
    "RemoteTeacher",
    "RequestCodec",
    "TeacherPipeline",
    "TeacherServer",
    "TeacherStage",
    "head_rows",
    "unknown_bias",
]
