"""A `Setting`: a recipe on a number of ranks, its DeepSpeed config and its models' costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amid_ds.config.recipe import Recipe, bounding_values
from amid_ds.engine.ds_config import (
    DeepSpeedConfig,
    accumulation_steps,
    data_parallel_size,
    gradients_in_fp32,
    offload_device,
    read_deepspeed_config,
    teacher_is_replicated,
    uses_bf16,
    zero_stage,
)
from amid_ds.models import loading
from amid_ds.planning.devices import Device
from amid_ds.planning.model_costs import ModelCosts, count_model
from amid_ds.run.warm_start import resolve_student

# DeepSpeed's own defaults, in elements.
DEFAULT_REDUCE_BUCKET = 500_000_000
DEFAULT_MAX_LIVE = 1_000_000_000
DEFAULT_MAX_REUSE_DISTANCE = 1_000_000_000


@dataclass(frozen=True)
class ZeroSettings:
    """The keys of a DeepSpeed config that a plan depends on; buckets and limits in elements."""

    stage: int
    bf16: bool
    gradients_in_fp32: bool
    # Bytes of a gradient as ranks exchange it, and of an element of Muon's moment.
    exchange_bytes: int
    offloads_weights: bool
    offloads_optimizer: bool
    reduce_bucket: int
    contiguous_gradients: bool
    overlaps_communication: bool
    max_live: int
    max_reuse_distance: int


def read_zero_settings(ds_config: DeepSpeedConfig) -> ZeroSettings:
    """The settings in a DeepSpeed config that `read_deepspeed_config` has checked."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero_stage(ds_config)
    exchanged = ds_config.get("communication_data_type",
                              "bf16" if uses_bf16(ds_config) else "fp32")
    return ZeroSettings(
        stage=stage,
        bf16=uses_bf16(ds_config),
        gradients_in_fp32=gradients_in_fp32(ds_config),
        exchange_bytes=4 if exchanged == "fp32" else 2,
        offloads_weights=offload_device(ds_config, "offload_param") != "none",
        offloads_optimizer=offload_device(ds_config, "offload_optimizer") != "none",
        reduce_bucket=int(zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET)) if stage else 0,
        contiguous_gradients=zero.get("contiguous_gradients", True),
        # By default DeepSpeed overlaps at stage 3 alone.
        overlaps_communication=(stage == 3 if zero.get("overlap_comm") is None
                                else zero["overlap_comm"]),
        max_live=int(zero.get("stage3_max_live_parameters", DEFAULT_MAX_LIVE)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", DEFAULT_MAX_REUSE_DISTANCE)))


@dataclass(frozen=True)
class Setting:
    """One rank of a run, as the plan sees it."""

    recipe: Recipe
    zero: ZeroSettings
    # Per rank and step; with an auxiliary corpus, its micro-batches too.
    micro_batches: int
    # Those of them that the teacher sees: an auxiliary corpus has as many, and no teacher.
    teacher_micro_batches: int
    # By ZeRO-3; else each rank holds all that tensor parallelism leaves it.
    teacher_is_sharded: bool
    student: ModelCosts
    # None where the run never needs the teacher.
    teacher: ModelCosts | None
    ranks: int
    device: Device

    @property
    def tensor_parallel(self) -> int:
        return self.recipe.tensor_parallel

    @property
    def data_parallel(self) -> int:
        return self.ranks // self.tensor_parallel

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.recipe.train.micro_batch_size * self.recipe.train.seq_length

    @property
    def teacher_tokens(self) -> int:
        """Tokens per rank and step that the teacher sees."""
        return self.tokens * self.teacher_micro_batches

    @property
    def activation_bytes(self) -> tuple[int, int]:
        """Bytes of the student's activations: kept for backward, and of one recomputed layer."""
        if self.recipe.student.activation_checkpointing:
            return self.student.checkpointed_bytes(self.tokens), self.student.layer_saved_bytes
        return self.student.body.saved_bytes, 0

    def partitioned(self, model: ModelCosts) -> int:
        """Elements of `model` that ZeRO-3 partitions; it gathers none that a rank has whole."""
        return model.weights.tp_rank if self.data_parallel > 1 else model.weights.tp_shared

    def remote_bytes(self, model: ModelCosts, elements: int) -> float:
        """Bytes, among `elements` of the weights of `model`, that lie on other ranks.

        ZeRO-3 partitions those that a tensor-parallel group shares over all ranks, the others over
        the data-parallel.
        """
        shared = min(model.weights.tp_shared, elements) if self.zero.stage == 3 else 0
        split = (elements - shared) * (1 - 1 / self.data_parallel)
        return model.element_size * (split + shared * (1 - 1 / self.ranks))


def make_setting(recipe: Recipe, ranks: int, device: Device) -> Setting:
    """The setting of `recipe` on one of `ranks` ranks, both models counted.

    Raises InputError for a layout or DeepSpeed config that cannot be, and for a model that does not
    run on the meta device.
    """
    data_parallel = data_parallel_size(recipe, ranks)
    ds_config = read_deepspeed_config(recipe, data_parallel)
    zero = read_zero_settings(ds_config)
    return Setting(
        recipe=recipe,
        zero=zero,
        micro_batches=ds_config["gradient_accumulation_steps"],
        teacher_micro_batches=accumulation_steps(recipe, data_parallel),
        teacher_is_sharded=zero.stage == 3 and not teacher_is_replicated(recipe, ds_config),
        student=count_model(resolve_student(recipe), torch.bfloat16 if zero.bf16 else torch.float32,
                            recipe, data_parallel),
        teacher=_count_teacher(recipe, data_parallel),
        ranks=ranks,
        device=device)


def _count_teacher(recipe: Recipe, data_parallel: int) -> ModelCosts | None:
    """The teacher's costs; None where there is none, or no step gives its divergence any weight."""
    teacher = recipe.teacher
    if teacher is None or not any(bounding_values(recipe.loss.kd_weight)):
        return None
    dtype = loading.DTYPES.get(teacher.dtype)
    if dtype is None:
        dtype = loading.checkpoint_dtype(teacher.model, **teacher.hub_kwargs)
    return count_model(teacher, dtype, recipe, data_parallel)
