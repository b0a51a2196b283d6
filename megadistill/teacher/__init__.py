"""The frozen teacher: one stage of its layers a rank, hidden states as its signal. It never meets the student."""

from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows, unknown_bias

__all__ = ["TeacherPipeline", "TeacherStage", "head_rows", "unknown_bias"]
