"""Bytes of the models' files that a rank reads at a start, and the seconds that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from amid_ds.errors import InputError
from amid_ds.planning.model_costs import ModelCosts
from amid_ds.planning.setting import Setting

# Bytes/s that one node reads of a shared file system: an assumption, `--storage` names another.
STORAGE_BANDWIDTH = 5e9


@dataclass(frozen=True)
class ReadAtStart:
    """Bytes that one rank reads from the file system, and seconds until a node has read its own.

    A weight that every rank of a node needs is read once, and the page cache serves the others: a
    rank's bytes are then its part of that. A resumed run reads the teacher, and a student of which
    a part is frozen: no checkpoint holds that.
    """

    student: int
    teacher: int
    storage_bandwidth: float
    seconds: float
    seconds_resumed: float


def storage_bandwidth(given: float | None) -> float:
    """The bytes/s of `--storage`; None: the assumed ones. Raises InputError unless above 0."""
    if given is None:
        return STORAGE_BANDWIDTH
    if not 0 < given < math.inf:
        raise InputError(f"--storage {given:g}", "bytes/s, finite and above 0",
                         "give what a node reads of the file system, such as 5e9")
    return given


def read_at_start(setting: Setting, storage_bandwidth: float = STORAGE_BANDWIDTH) -> ReadAtStart:
    """What `setting` reads where each node reads `storage_bandwidth` bytes/s."""
    student = _student_bytes(setting)
    teacher = 0 if setting.teacher is None else _teacher_bytes(setting, setting.teacher)
    per_byte = setting.ranks_per_node / storage_bandwidth
    is_whole = setting.student.trained.total == setting.student.weights.total
    resumed = teacher if is_whole else student + teacher
    return ReadAtStart(student, teacher, storage_bandwidth, seconds=(student + teacher) * per_byte,
                       seconds_resumed=resumed * per_byte)


def _student_bytes(setting: Setting) -> int:
    student = setting.student
    if setting.zero.stage == 3:
        return int(setting.student_partition(student.stored) * student.stored_size)
    return _once_per_node(setting, student)


def _teacher_bytes(setting: Setting, teacher: ModelCosts) -> int:
    if setting.recipe.live_teacher is None:
        # The student's running mean, which is in no file.
        return 0
    if setting.teacher_is_sharded:
        return int(teacher.weights.partition(setting.teacher_groups, setting.group)
                   * teacher.stored_size)
    return _once_per_node(setting, teacher)


def _once_per_node(setting: Setting, model: ModelCosts) -> int:
    return -(-int(model.stored.total * model.stored_size) // setting.ranks_per_node)
