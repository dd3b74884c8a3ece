"""The plan of one rank: memory, network, FLOPs and a rough time, before any job is queued.

Sizes follow from the recipe, the DeepSpeed config and the two models' configs; nothing is measured
here. Assumptions about hardware are in devices.py. The time is rough, and no GPU run has been
compared with it; the memory is meant to be compared with a run (check.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from amid_ds.config.recipe import Recipe
from amid_ds.planning.devices import EFFICIENCY, HEADROOM, Device, find_device
from amid_ds.planning.memory import FP32_BYTES, memory_per_rank, moment_bytes
from amid_ds.planning.network import network_per_step
from amid_ds.planning.setting import Setting, make_setting

# FLOPs of forward and backward over those of forward alone: backward has two products for each one
# of forward.
TRAINING_PASSES = 3


@dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs and seconds of one rank; tokens and `checkpoint_bytes` are of all ranks."""

    device: Device
    ranks: int
    tokens_per_step: int
    micro_batches: int
    # None: as many as the recipe's epochs have, and its data are not prepared yet.
    steps: int | None
    memory_per_rank: dict[str, int]
    # Bytes that the rank receives.
    network_per_step: dict[str, int]
    flops_per_step: dict[str, float]
    seconds_per_step: float
    checkpoint_bytes: int
    # Bytes of a rank, `without_checkpointing` and `with_checkpointing`.
    activations: dict[str, int]
    fits: bool
    # Of each source by the last step; None where only reading the data would tell.
    epochs: list[float] | None = None
    remedies: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float | None:
        """None where the number of steps is not known."""
        return None if self.steps is None else self.steps * self.seconds_per_step / 3600

    @property
    def mfu(self) -> float:
        """FLOPs that the models need over those that the device could have done meanwhile."""
        return sum(self.flops_per_step.values()) / (self.seconds_per_step * self.device.flops)


def estimate_plan(recipe: Recipe, nodes: int, ranks: int, device: Device) -> Plan:
    """The plan of `recipe` on `ranks` ranks on `nodes` nodes, without epochs and remedies.

    Raises InputError as `make_setting` does.
    """
    setting = make_setting(recipe, ranks, device)
    train, student = recipe.train, setting.student
    memory = memory_per_rank(setting)
    network = network_per_step(setting)
    flops = flops_per_step(setting)
    # A checkpoint holds fp32 weights and the moments, and the bf16 weights.
    weight_bytes = FP32_BYTES + (student.element_size if setting.zero.bf16 else 0)
    weights = student.weights.total
    return Plan(
        device=device,
        ranks=ranks,
        tokens_per_step=train.global_batch_size * train.seq_length,
        micro_batches=setting.micro_batches,
        steps=train.steps,
        memory_per_rank=memory,
        network_per_step=network,
        flops_per_step=flops,
        seconds_per_step=_seconds_per_step(setting, nodes, flops, network),
        checkpoint_bytes=weights * weight_bytes + moment_bytes(setting.zero, weights,
                                                               student.muon.total),
        activations={
            "without_checkpointing": student.body.saved_bytes,
            "with_checkpointing": (student.checkpointed_bytes(setting.tokens)
                                   + student.layer_saved_bytes)},
        fits=memory["total"] <= HEADROOM * device.memory)


def planned_flops(recipe: Recipe, ranks: int,
                  device: Device | None) -> tuple[dict[str, float], float | None]:
    """A rank's FLOPs per step of `student` and `teacher`; its device's FLOP/s (None: unknown)."""
    # The FLOPs are the same on any device.
    flops = estimate_plan(recipe, 1, ranks, device or find_device("cpu", 1)).flops_per_step
    return flops, device.flops if device is not None else None


def flops_per_step(setting: Setting) -> dict[str, float]:
    """FLOPs of one rank in a step, bodies and heads, without recomputed layers (as MFU counts)."""
    student, teacher = setting.student, setting.teacher
    per_head_weight = 2 * setting.tokens / setting.tensor_parallel
    of_student = student.body.flops + per_head_weight * student.head
    of_teacher = 0.0 if teacher is None else teacher.body.flops + per_head_weight * teacher.head
    return {"student": TRAINING_PASSES * setting.micro_batches * of_student,
            "teacher": setting.teacher_micro_batches * of_teacher}


def _seconds_per_step(setting: Setting, nodes: int, flops: dict[str, float],
                      network: dict[str, int]) -> float:
    """The longer of arithmetic and network, as if the two overlapped completely."""
    device = setting.device
    recomputed = 0.0
    if setting.recipe.student.activation_checkpointing:
        recomputed = setting.student.body.flops * setting.micro_batches
    arithmetic = (sum(flops.values()) + recomputed) / (device.flops * EFFICIENCY)
    # A tensor-parallel group shares a node.
    within_node = network.get("tensor_parallel", 0)
    between_ranks = sum(network.values()) - within_node
    bandwidth = device.bandwidth if nodes > 1 else device.neighbours
    return max(arithmetic, within_node / device.neighbours + between_ranks / bandwidth)
