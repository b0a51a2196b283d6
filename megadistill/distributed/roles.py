"""Roles of the ranks of a launch where the teacher has ranks of its own.

The first ranks are the student's, the last ones the teacher's: replica after replica, stage after stage. Each replica
serves an equal run of the student's ranks, its *clients*.
"""

from dataclasses import dataclass

from megadistill.errors import UserError


@dataclass(frozen=True)
class Roles:
    """A launch of `world` ranks, of which the last `teachers` are the teacher's, in pipelines of `stages`.

    Raises:
        UserError: the numbers do not divide.
    """

    world: int
    teachers: int
    stages: int

    def __post_init__(self) -> None:
        if not 0 < self.teachers < self.world:
            raise UserError(
                f"teacher.ranks is {self.teachers}, and the launch has {self.world} processes: the teacher needs at "
                "least one, and so does the student"
            )
        if self.teachers % self.stages:
            raise UserError(
                f"teacher.ranks {self.teachers} does not divide into pipelines of teacher.stages {self.stages}: "
                f"make teacher.ranks a multiple of {self.stages}"
            )
        if self.students % self.replicas:
            raise UserError(
                f"{self.students} ranks of the student cannot be shared out to {self.replicas} replicas of the "
                f"teacher (teacher.ranks {self.teachers} / teacher.stages {self.stages}): make the student's ranks a "
                "multiple of the replicas"
            )

    @property
    def students(self) -> int:
        return self.world - self.teachers

    @property
    def replicas(self) -> int:
        return self.teachers // self.stages

    def is_student(self, rank: int) -> bool:
        return rank < self.students

    def replica(self, rank: int) -> int:
        """The replica of a teacher's rank, or the one that serves a student's rank."""
        if self.is_student(rank):
            return rank // (self.students // self.replicas)
        return (rank - self.students) // self.stages

    def stage(self, rank: int) -> int:
        """The stage of a teacher's rank."""
        return (rank - self.students) % self.stages

    def rank_of(self, replica: int, stage: int) -> int:
        return self.students + replica * self.stages + stage

    def clients(self, replica: int) -> range:
        share = self.students // self.replicas
        return range(replica * share, (replica + 1) * share)

    def members(self, replica: int) -> list[int]:
        """The ranks of a replica's groups: its clients, then its stages."""
        return [*self.clients(replica), *(self.rank_of(replica, stage) for stage in range(self.stages))]
