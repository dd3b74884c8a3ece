"""The recipe's keys that tell others of a run: statistics, trackers, callbacks, samples, tasks."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from amid_ds.config.scheduled_values import Measure
from amid_ds.config.section import NonNegativeInt, PositiveInt, Section

# What metrics.jsonl can say of each step beside its losses. agreement: of both models' first
# choices.
Statistic = Literal[Measure, "agreement"]
# Each but the first is an extra of its name: pip install 'amid-ds[wandb]'.
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
CALLBACK_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class ReportingKeys(Section):
    """What the `train` section says of a run's log beside its intervals."""

    statistics: list[Statistic] = Field(default=[])
    """What metrics.jsonl has beside the losses: means over the tokens of the step's batch."""
    trackers: list[TrackerName] = Field(default=["tensorboard"])
    """Where the log's curves go beside metrics.jsonl; each but tensorboard is an extra."""
    callbacks: list[str] = Field(default=[])
    """Classes of the user's own, each `package.module:Class`, told of steps, evaluations and
    checkpoints."""
    samples: NonNegativeInt = 0
    """Prompts that the student, and once the teacher, answers in each evaluation, for reports."""

    @field_validator("statistics", "trackers", "callbacks")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("each once")
        return names

    @field_validator("callbacks")
    @classmethod
    def _names_a_class(cls, names: list[str]) -> list[str]:
        for name in names:
            if CALLBACK_NAME.fullmatch(name) is None:
                raise ValueError(f"{name!r} names no class; write package.module:Class")
        return names


class EvalTasks(Section):
    """Benchmarks by lm-evaluation-harness of a run's checkpoints, in jobs of their own."""

    every: PositiveInt
    """Steps between the checkpoints that are judged; the last one always is."""
    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of its tasks, or paths of YAML files that define one."""
    apply_chat_template: bool = False
    """Prompts are messages in the tokenizer's chat template."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) < len(tasks) or not all(name.strip() for name in tasks):
            raise ValueError("each once, and none empty")
        return tasks
