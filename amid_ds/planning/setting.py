"""A `Setting`: a recipe on a number of ranks, its DeepSpeed config and its models' costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from amid_ds.config.recipe import MeanTeacher, Recipe, Teacher, bounding_values
from amid_ds.data import TargetFolder
from amid_ds.distributed.nodes import require_divisor, require_whole_groups
from amid_ds.engine.ds_config import (
    DeepSpeedConfig,
    accumulation_steps,
    data_parallel_size,
    gradients_in_fp32,
    offload_device,
    quantizes_weights,
    read_deepspeed_config,
    secondary_ranks,
    uses_bf16,
    zero_stage,
)
from amid_ds.engine.expert_parallel import require_expert_parallel
from amid_ds.models import loading
from amid_ds.planning.devices import Device
from amid_ds.planning.model_costs import (
    ModelCosts,
    WeightCounts,
    count_model,
    summed_costs,
)
from amid_ds.planning.rings import Shards, shards_over
from amid_ds.run.warm_start import frozen_models, resolve_student

# DeepSpeed's own defaults, in elements.
DEFAULT_REDUCE_BUCKET = 500_000_000
DEFAULT_PREFETCH_BUCKET = 50_000_000
DEFAULT_PERSISTENCE_THRESHOLD = 100_000
DEFAULT_MAX_LIVE = 1_000_000_000
DEFAULT_MAX_REUSE_DISTANCE = 1_000_000_000
# Of an id, and of a log-probability or weight, in SparseTargets.
ID_BYTES, LOG_BYTES = 8, 4

PlacementName = Literal["zero3", "node", "replicated"]


class Placement(NamedTuple):
    """Where the teacher lies: sharded over so many neighbouring data-parallel ranks.

    `zero3`: over all of them; `node`: over `shard_over`; `replicated`: each holds it whole.
    """

    name: PlacementName
    shard_over: int


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
    # Buckets of weights that are gathered together; those of no more elements than the threshold
    # stay whole.
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    max_reuse_distance: int
    # Ranks over which ZeRO++ shards a second copy of the student (hpZ); 1: there is none.
    secondary_ranks: int
    # True where a student's matrix travels in 8 bits, except for its head.
    quantizes_weights: bool


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
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", DEFAULT_PREFETCH_BUCKET)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold",
                                           DEFAULT_PERSISTENCE_THRESHOLD)),
        max_live=int(zero.get("stage3_max_live_parameters", DEFAULT_MAX_LIVE)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", DEFAULT_MAX_REUSE_DISTANCE)),
        secondary_ranks=secondary_ranks(ds_config),
        quantizes_weights=quantizes_weights(ds_config))


@dataclass(frozen=True)
class Setting:
    """One rank of a run, as the plan sees it."""

    recipe: Recipe
    zero: ZeroSettings
    # Per rank and step; with an auxiliary corpus, its micro-batches too.
    micro_batches: int
    # Those of them that the teacher sees: an auxiliary corpus has as many, and no teacher.
    teacher_micro_batches: int
    student: ModelCosts
    # None where the run never needs the teacher, or has a cache of it; of a delta all its models.
    teacher: ModelCosts | None
    # The models of the teacher by the recipe's keys, {} without.
    frozen: Mapping[str, ModelCosts]
    # Of a token, what a cache keeps of the teacher there, on the device; 0: no cache.
    target_bytes: int
    placement: Placement
    nodes: int
    ranks: int
    device: Device

    @property
    def tensor_parallel(self) -> int:
        return self.recipe.tensor_parallel

    @property
    def data_parallel(self) -> int:
        return self.ranks // self.tensor_parallel

    @property
    def group(self) -> int:
        """Ranks that divide a model's weights before ZeRO-3 shards each part: tensor parallel, or
        its experts alone, expert parallel. They exclude each other."""
        return self.recipe.tensor_parallel * self.recipe.expert_parallel

    @property
    def teacher_groups(self) -> int:
        """Groups over which a sharded teacher lies."""
        return self.placement.shard_over * self.tensor_parallel // self.group

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.recipe.train.micro_batch_size * self.recipe.train.seq_length

    @property
    def losses_at_once(self) -> int:
        """Losses that the rows of a micro-batch may have; each holds a gradient of the head."""
        sources, own = len(self.recipe.data.train), len(self.recipe.source_losses)
        return min(own + (own < sources), self.recipe.train.micro_batch_size)

    @property
    def teacher_tokens(self) -> int:
        """Tokens per rank and step that the teacher sees."""
        return self.tokens * self.teacher_micro_batches

    @property
    def ahead(self) -> int:
        """Passes of the student's body in a step that count its routers' choices in advance."""
        micro_batches = self.teacher_micro_batches
        return micro_batches if self.student.router_bytes and micro_batches > 1 else 0

    @property
    def activation_bytes(self) -> tuple[int, int]:
        """Bytes of the student's activations: kept for backward, and of one recomputed layer."""
        if self.recipe.student.activation_checkpointing:
            return (self.student.checkpointed_bytes(self.tokens),
                    self.student.body.largest_layer_bytes)
        return self.student.kept_bytes(self.tokens), 0

    @property
    def on_cpu(self) -> bool:
        return self.device.name == "cpu"

    @property
    def ranks_per_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @property
    def teacher_is_sharded(self) -> bool:
        """By ZeRO-3; else each rank holds all that tensor parallelism leaves it."""
        return self.zero.stage == 3 and self.placement.name != "replicated"

    @property
    def student_shards(self) -> Shards:
        return shards_over(self.ranks // self.group, self.group, self.ranks_per_node)

    @property
    def teacher_shards(self) -> Shards:
        """Of a teacher that is sharded."""
        return shards_over(self.teacher_groups, self.group, self.ranks_per_node)

    @property
    def secondary_shards(self) -> Shards:
        """Of the student's second copy, which knows no tensor parallelism."""
        return shards_over(self.zero.secondary_ranks, 1, self.ranks_per_node)

    def student_partition(self, weights: WeightCounts) -> int:
        """Elements of the student's `weights` on a rank of ZeRO-3."""
        return weights.partition(self.ranks // self.group, self.group)


def partitioned(model: ModelCosts, shards: Shards) -> int:
    """Elements of `model` that ZeRO-3 partitions; it gathers none that a rank has whole."""
    return model.weights.tp_rank if shards.split.ranks > 1 else model.weights.tp_shared


def make_setting(recipe: Recipe, ranks: int, device: Device, nodes: int = 1) -> Setting:
    """The setting of `recipe` on one of `ranks` ranks on `nodes` nodes, both models counted.

    `teacher.placement: auto` is zero3 here: planning/placement.py chooses. Raises InputError for a
    layout or DeepSpeed config that cannot be, and for a model that does not run on the meta device.
    """
    data_parallel = data_parallel_size(recipe, ranks)
    ds_config = read_deepspeed_config(recipe, data_parallel)
    zero = read_zero_settings(ds_config)
    if recipe.live_teacher is not None and recipe.live_teacher.shard_over is not None:
        require_divisor(recipe.live_teacher.shard_over, data_parallel)
    if recipe.expert_parallel > 1:
        models = {"student": resolve_student(recipe), **frozen_models(recipe)}
        require_expert_parallel(recipe, ds_config, data_parallel, {
            f"{key} {model.model}": loading.meta_model(model.model, **model.hub_kwargs)
            for key, model in models.items()})
    placement = _given_placement(recipe, data_parallel, -(-ranks // nodes))
    frozen = _count_frozen(recipe, placement, zero)
    return Setting(
        recipe=recipe,
        zero=zero,
        micro_batches=ds_config["gradient_accumulation_steps"],
        teacher_micro_batches=accumulation_steps(recipe, data_parallel),
        # A CPU has no kernels for scans: transformers' own code runs there.
        student=count_model(resolve_student(recipe), torch.bfloat16 if zero.bf16 else torch.float32,
                            recipe, fused=device.name != "cpu"),
        teacher=summed_costs(frozen),
        frozen=frozen,
        target_bytes=_target_bytes(recipe),
        placement=placement,
        nodes=nodes,
        ranks=ranks,
        device=device)


def with_placement(setting: Setting, placement: Placement) -> Setting:
    """`setting` with its teacher placed otherwise."""
    frozen = _count_frozen(setting.recipe, placement, setting.zero)
    return replace(setting, placement=placement, teacher=summed_costs(frozen), frozen=frozen)


def _given_placement(recipe: Recipe, data_parallel: int, ranks_per_node: int) -> Placement:
    """The recipe's own placement; zero3 where it leaves the choice."""
    name = "zero3" if recipe.live_teacher is None else recipe.live_teacher.placement
    if name == "replicated":
        return Placement(name, 1)
    if name == "node":
        over = ranks_of_shard(recipe, data_parallel, ranks_per_node)
        require_whole_groups(recipe.expert_parallel, over)
        return Placement(name, over)
    return Placement("zero3", data_parallel)


def ranks_of_shard(recipe: Recipe, data_parallel: int, ranks_per_node: int) -> int:
    """Data-parallel ranks over which `placement: node` shards: the recipe's, or a node's."""
    assert recipe.live_teacher is not None
    of_node = min(data_parallel, max(1, ranks_per_node // recipe.tensor_parallel))
    return recipe.live_teacher.shard_over or of_node


def _target_bytes(recipe: Recipe) -> int:
    """Bytes of a token's SparseTargets; of draws at most, as if all were different."""
    if recipe.cached_teacher is None:
        return 0
    manifest = TargetFolder.open(Path(recipe.cached_teacher.cached)).manifest
    layout = manifest.layout
    kept = ID_BYTES + LOG_BYTES * (2 if layout.sampled else 1)
    return layout.entries * kept + LOG_BYTES * (1 if layout.sampled else 2)


def _count_frozen(recipe: Recipe, placement: Placement, zero: ZeroSettings
                  ) -> dict[str, ModelCosts]:
    """The costs of the teacher's models by the recipe's keys; {} where there is none, or no step
    gives its divergence any weight."""
    if not any(any(bounding_values(loss.kd_weight)) or loss.token_weight
               for loss in recipe.losses):
        return {}
    models = loading.in_one_dtype(frozen_models(recipe))
    if isinstance(recipe.teacher, MeanTeacher):
        # As the student, whose shapes and dtype it has.
        student = resolve_student(recipe)
        models["teacher"] = Teacher(model=student.model, **student.hub_kwargs,
                                    dtype="bf16" if zero.bf16 else "fp32")
    # Outside the engine no tensor parallelism splits them.
    whole = placement.name == "replicated"
    return {key: count_model(model, loading.DTYPES.get(model.dtype) or loading.checkpoint_dtype(
                model.model, **model.hub_kwargs), recipe, whole)
            for key, model in models.items()}
