"""A rough time of a step: arithmetic and two kinds of link, each overlapped with the others.

The teacher's passes come first, then the student's; within each of the two, products and gathers
run at the same time, and a collective moves through both kinds of link at once, so the longest of
the three counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from amid_ds.planning.devices import EFFICIENCY
from amid_ds.planning.model_costs import ModelCosts
from amid_ds.planning.network import ModelName, step_traffic, sum_traffic
from amid_ds.planning.rings import Traffic
from amid_ds.planning.setting import Setting


@dataclass(frozen=True)
class PartSeconds:
    """Seconds in a step of arithmetic, and of the links within and between nodes."""

    flops: float
    links_inside: float
    links_between: float

    @property
    def longest(self) -> float:
        return max(self.flops, self.links_inside, self.links_between)


@dataclass(frozen=True)
class StepTime:
    """The seconds of each model, by its name."""

    by_model: Mapping[ModelName, PartSeconds]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(each.longest for each in self.by_model.values())

    @property
    def parts(self) -> PartSeconds:
        """Of both models, as if nothing overlapped."""
        each = self.by_model.values()
        return PartSeconds(sum(one.flops for one in each), sum(one.links_inside for one in each),
                           sum(one.links_between for one in each))

    @property
    def binds(self) -> str:
        """What most of the step waits for: `flops`, `links_inside` or `links_between`."""
        waits = {"flops": 0.0, "links_inside": 0.0, "links_between": 0.0}
        for each in self.by_model.values():
            of_model = asdict(each)
            waits[max(of_model, key=of_model.__getitem__)] += each.longest
        return max(waits, key=waits.__getitem__)


def flops_per_step(setting: Setting) -> dict[str, float]:
    """FLOPs of one rank in a step, bodies and heads, without recomputed layers (as MFU counts)."""
    student, teacher = setting.student, setting.teacher
    # The logits, the gradient of the hidden states and the weight's own.
    products = 1 + student.body_is_trained + student.head_is_trained
    of_student = (student.body.flops + student.body.backward_flops
                  + products * 2 * setting.tokens * student.head)
    return {"student": setting.micro_batches * of_student,
            "teacher": 0.0 if teacher is None else teacher_flops(setting, teacher)}


def teacher_flops(setting: Setting, teacher: ModelCosts) -> float:
    """FLOPs of one rank in a step of the teacher, or of one of its models."""
    per_micro_batch = teacher.body.flops + 2 * setting.tokens * teacher.head
    return setting.teacher_micro_batches * per_micro_batch


def step_time(setting: Setting) -> StepTime:
    """The seconds of a step on `setting`."""
    flops = flops_per_step(setting)
    student = setting.student.body
    # Passes of the body beside the model's own: recomputed layers, and routers' choices counted
    # ahead.
    again = setting.ahead
    if setting.recipe.student.activation_checkpointing:
        again += setting.micro_batches
    flops["student"] += again * student.flops
    # Experts that run for tokens that did not choose them take time, and are no FLOPs of the model.
    passes = setting.micro_batches * (1 + student.backward_flops / max(1, student.flops)) + again
    flops["student"] += passes * student.idle_flops
    if setting.teacher is not None:
        flops["teacher"] += setting.teacher.body.idle_flops * setting.teacher_micro_batches
    if setting.teacher is not None and any(loss.makes_logits_twice
                                           for loss in setting.recipe.losses):
        for model, costs in (("student", setting.student), ("teacher", setting.teacher)):
            flops[model] += 2 * setting.teacher_tokens * costs.head
    return StepTime({model: _model_seconds(setting, flops[model], sum_traffic(traffic.values()))
                     for model, traffic in step_traffic(setting).items()})


def _model_seconds(setting: Setting, flops: float, traffic: Traffic) -> PartSeconds:
    device = setting.device
    return PartSeconds(
        flops=flops / (device.flops * EFFICIENCY),
        links_inside=traffic.inside / device.neighbours + traffic.inside_waits,
        links_between=traffic.between / device.bandwidth + traffic.between_waits)
