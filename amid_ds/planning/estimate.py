"""The plan of one rank: memory, network, FLOPs and a rough time, before any job is queued.

Sizes follow from the recipe, the DeepSpeed config and the two models' configs; nothing is measured
here. Assumptions about hardware are in devices.py. The time is rough, and no GPU run has been
compared with it; the memory is meant to be compared with a run (check.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from amid_ds.config.recipe import Recipe
from amid_ds.engine.ema import mean_decays
from amid_ds.models.tensor_parallel import WholePart, named_parts
from amid_ds.planning.devices import Device, find_device
from amid_ds.planning.memory import (
    FP32_BYTES,
    fits,
    memory_per_rank,
    moment_bytes,
    teacher_weight_bytes,
)
from amid_ds.planning.network import network_per_step, teacher_gathers
from amid_ds.planning.placement import (
    ChosenPlacement,
    PlacementCosts,
    choose_placement,
    placed,
    placement_costs,
)
from amid_ds.planning.reading import STORAGE_BANDWIDTH, ReadAtStart, read_at_start
from amid_ds.planning.setting import make_setting
from amid_ds.planning.step_time import flops_per_step, step_time, teacher_flops


@dataclass(frozen=True)
class FrozenModel:
    """One of the teacher's models on one rank: its key in the recipe, its parameters and those that
    a token passes; bytes of its weights, and of the experts of one layer; FLOPs, and bytes that its
    gathers receive, in a step."""

    key: str
    parameters: int
    active: int
    expert_gather_bytes: int
    weight_bytes: int
    flops: float
    gathered_bytes: int


@dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs and seconds of one rank; tokens and `checkpoint_bytes` are of all ranks."""

    device: Device
    nodes: int
    ranks: int
    tokens_per_step: int
    micro_batches: int
    # None: as many as the recipe's epochs have, and its data are not prepared yet.
    steps: int | None
    memory_per_rank: dict[str, int]
    # Bytes that the rank receives; `student_between_nodes` and `teacher_between_nodes` are
    # contained in the other parts.
    network_per_step: dict[str, int]
    flops_per_step: dict[str, float]
    seconds_per_step: float
    # What most of a step waits for: `flops`, `links_inside` or `links_between`; and the seconds of
    # each for student and teacher.
    binds: str
    seconds_by_model: dict[str, dict[str, float]]
    read_at_start: ReadAtStart
    # The teacher's, for which all of the above is; and every one that the layout may have.
    placement: ChosenPlacement
    placements: list[PlacementCosts]
    # The student's weights: `held`, of them `active` for a token; `trained`, and `frozen`, those
    # that are not.
    parameters: dict[str, int]
    # The most that ZeRO-3 gathers of the student's experts at once, those of a layer; 0: no
    # mixture.
    expert_gather_bytes: int
    # By model what tensor parallelism leaves whole of its layers, worth naming.
    whole_parts: dict[str, list[WholePart]]
    # The models with scans that are counted as fused kernels do them.
    fused_scans: list[str]
    # The models that the teacher is made of; its parts above are their sums.
    frozen_models: list[FrozenModel]
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

    @property
    def tokens_per_day(self) -> float:
        """Of all ranks."""
        return self.tokens_per_step / self.seconds_per_step * 86400


def estimate_plan(recipe: Recipe, nodes: int, ranks: int, device: Device,
                  storage_bandwidth: float = STORAGE_BANDWIDTH) -> Plan:
    """The plan of `recipe` on `ranks` ranks on `nodes` nodes, without epochs and remedies.

    storage_bandwidth: bytes/s that a node reads. Raises InputError as `make_setting` does.
    """
    counted = make_setting(recipe, ranks, device, nodes)
    chosen = choose_placement(counted)
    setting = placed(counted, chosen)
    train, student = recipe.train, setting.student
    memory, time = memory_per_rank(setting), step_time(setting)
    # A checkpoint holds fp32 weights, their means and the moments, and the bf16 weights, of what is
    # trained.
    weight_bytes = (FP32_BYTES * (1 + len(mean_decays(recipe)))
                    + (student.element_size if setting.zero.bf16 else 0))
    weights = student.trained.total
    return Plan(
        device=device,
        nodes=nodes,
        ranks=ranks,
        tokens_per_step=train.global_batch_size * train.seq_length,
        micro_batches=setting.micro_batches,
        steps=train.steps,
        memory_per_rank=memory,
        network_per_step=network_per_step(setting),
        flops_per_step=flops_per_step(setting),
        seconds_per_step=time.seconds,
        binds=time.binds,
        seconds_by_model={name: asdict(each) for name, each in time.by_model.items()},
        read_at_start=read_at_start(setting, storage_bandwidth),
        placement=chosen,
        placements=placement_costs(counted),
        parameters={"held": student.weights.total, "active": student.active,
                    "trained": weights, "frozen": student.weights.total - weights},
        expert_gather_bytes=student.expert_gather * student.element_size,
        whole_parts={name: named_parts(costs.whole_parts, costs.weights.total)
                     for name, costs in {"student": student, **setting.frozen}.items()},
        fused_scans=[model for model, costs in (("student", student), ("teacher", setting.teacher))
                     if costs is not None and costs.has_fused_scans],
        frozen_models=[FrozenModel(key, costs.weights.total, costs.active,
                                   costs.expert_gather * costs.element_size,
                                   teacher_weight_bytes(setting, costs),
                                   teacher_flops(setting, costs),
                                   int(teacher_gathers(setting, costs).received))
                       for key, costs in setting.frozen.items()],
        checkpoint_bytes=weights * weight_bytes + moment_bytes(setting.zero, weights,
                                                               student.muon.total),
        activations={
            "without_checkpointing": student.kept_bytes(setting.tokens),
            "with_checkpointing": (student.checkpointed_bytes(setting.tokens)
                                   + student.body.largest_layer_bytes)},
        fits=fits(setting, memory))


def planned_flops(recipe: Recipe, ranks: int,
                  device: Device | None) -> tuple[dict[str, float], float | None]:
    """A rank's FLOPs per step of `student` and `teacher`; its device's FLOP/s (None: unknown)."""
    # The FLOPs are the same on any device; of a CPU the memory of scans would be counted too.
    setting = make_setting(recipe, ranks, device or find_device("h100-80g", 1))
    return flops_per_step(setting), device.flops if device is not None else None
