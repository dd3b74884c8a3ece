"""The shape that `bench step` measures: its models and micro-batches, and the memory they need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from amid_ds.config.recipe import Dtype, Recipe
from amid_ds.errors import InputError
from amid_ds.experiments.small_models import HEAD_WIDTH, LlamaSize, llama_config, new_llama
from amid_ds.models.loading import DTYPES
from amid_ds.planning.devices import HEADROOM, Device
from amid_ds.planning.memory import memory_per_rank, state_bytes
from amid_ds.planning.setting import make_setting

MICRO_BATCHES = 4
# Steps that learn from a cache -> the ids that it keeps of a token: the most probable, or drawn.
CACHED_VARIANTS = {"topk_64": 64, "sample_50": 50}
# In the order in which they are measured; the last one is left out where it does not fit.
STEP_VARIANTS = ("student", "teacher", "distillation", *CACHED_VARIANTS, "usual")
# Of an id kept of a token: the id in int64, its log-probability or weight in fp32, twice of a draw.
TARGET_BYTES = 16
# Tensors of tokens x vocabulary in fp32 that the usual way holds at its peak, both logits among
# them: by the peaks of 1 and 4 rows in engine/README.md, 2,891 MB more for 3 rows than distillation
# takes, whose tensors are of 65.5 MB a row.
FULL_LOGITS_TENSORS = 15


@dataclass(frozen=True)
class StepScale:
    """The models, as (width, layers), their vocabulary, and micro-batches of `rows` x `length`."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    length: int
    rounds: int
    dtype: Dtype

    @property
    def models(self) -> dict[str, LlamaSize]:
        """The sizes of `student` and `teacher`."""
        return {name: LlamaSize.of_width(*shape)
                for name, shape in (("student", self.student), ("teacher", self.teacher))}

    def check(self) -> StepScale:
        """The scale itself. Raises InputError for one that there is no model or batch of."""
        least = {"--rows": (self.rows, 1), "--length": (self.length, 2),
                 "--vocabulary": (self.vocabulary, 2), "layers of --student": (self.student[1], 1),
                 "layers of --teacher": (self.teacher[1], 1)}
        lines = [f"{name}: {value}, at least {low}" for name, (value, low) in least.items()
                 if value < low]
        lines += [f"width of --{name}: {size.hidden_size}, a multiple of {HEAD_WIDTH}"
                  for name, size in self.models.items()
                  if size.hidden_size < 1 or size.hidden_size % HEAD_WIDTH]
        if lines:
            raise InputError(f"bench step cannot have this shape: {'; '.join(lines)}",
                             f"numbers above 0, heads of {HEAD_WIDTH}", "change these options")
        return self

    def recipe(self, folder: Path, data_parallel: int, variant: str) -> Recipe:
        """The recipe of a variant, of the models in `folder`; no cache is read."""
        recipe: dict[str, object] = {
            "student": {"model": str(folder / "student")},
            "data": {"train": [{"path": "none"}]},
            "output_dir": str(folder),
            "train": {"steps": 100, "seq_length": self.length, "micro_batch_size": self.rows,
                      "global_batch_size": self.rows * MICRO_BATCHES * data_parallel},
            "deepspeed": "zero3_fp32.json" if self.dtype == "fp32" else "zero3.json",
        }
        if variant in CACHED_VARIANTS:
            recipe["teacher"] = {"cached": "none"}
            # The estimate from samples is of what is linear in the teacher's distribution.
            recipe["loss"] = {"preset": "fkl"} if variant.startswith("sample") else {}
        elif variant != "student":
            recipe["teacher"] = {"model": str(folder / "teacher")}
        return Recipe.model_validate(recipe)


STEP_SCALES = {
    # 50 M and 147 M parameters.
    "cpu": StepScale((512, 8), (768, 13), 32000, 1, 512, 3, "fp32"),
    # 0.5 B and 9.1 B.
    "cuda": StepScale((1024, 24), (4096, 32), 128256, 4, 2048, 10, "bf16"),
}


@dataclass(frozen=True)
class StepNeed:
    """Bytes of a rank: those that stay from step to step, and the most at once."""

    states: int
    total: int


def save_configs(folder: Path, scale: StepScale) -> None:
    """Save both models' configs in `folder`: a plan needs no weights."""
    for name, size in scale.models.items():
        llama_config(size, scale.vocabulary, max_position_embeddings=scale.length,
                     dtype=DTYPES[scale.dtype],
                     architectures=["LlamaForCausalLM"]).save_pretrained(folder / name)


def save_models(folder: Path, scale: StepScale) -> None:
    """Save both models with random weights in `folder`."""
    for name, size in scale.models.items():
        model = new_llama(size, scale.vocabulary, max_position_embeddings=scale.length)
        model.to(DTYPES[scale.dtype]).save_pretrained(folder / name)


def step_needs(scale: StepScale, folder: Path, ranks: int, device: Device) -> dict[str, StepNeed]:
    """What each variant needs, by the plan of the models whose configs are in `folder`."""
    setting = make_setting(scale.recipe(folder, ranks, "distillation"), ranks, device)
    memory = memory_per_rank(setting)
    ours = StepNeed(sum(state_bytes(setting).values()), memory["total"])
    alone = replace(setting, teacher=None)
    student = StepNeed(sum(state_bytes(alone).values()), memory_per_rank(alone)["total"])
    tokens = MICRO_BATCHES * scale.rows * scale.length
    cached = {name: replace(student, total=student.total + tokens * kept * TARGET_BYTES)
              for name, kept in CACHED_VARIANTS.items()}
    elements = scale.rows * scale.length * scale.vocabulary
    # Beside the fp32 tensors, the logits as the models give them.
    logits = elements * (4 * FULL_LOGITS_TENSORS + (2 * 2 if scale.dtype == "bf16" else 0))
    return {"student": student, "teacher": ours, "distillation": ours, **cached,
            "usual": StepNeed(ours.states, ours.total - memory["loss_workspace"] + logits)}


def fitting_scale(scale: StepScale, folder: Path, ranks: int, device: Device,
                  may_shrink: bool) -> tuple[StepScale, tuple[str, ...], bool]:
    """(The scale, the variants that fit the device, whether all of them fit at once).

    may_shrink: halve the rows, down to 1, until every variant fits. Raises InputError where
    distillation does not.
    """
    needs = step_needs(scale, folder, ranks, device)
    most = HEADROOM * device.memory
    if may_shrink and scale.rows > 1 and max(need.total for need in needs.values()) > most:
        return fitting_scale(replace(scale, rows=scale.rows // 2), folder, ranks, device,
                             may_shrink)
    ours = needs["distillation"]
    if ours.total > most:
        raise InputError(
            f"distillation at this shape, {ours.total / 1e9:.1f} GB on each of {ranks} rank(s)",
            f"at most {most / 1e9:.1f} GB", "give fewer --rows, a shorter --length, or smaller "
            "models")
    variants = tuple(name for name in STEP_VARIANTS if needs[name].total <= most)
    fit = [needs[name] for name in variants]
    at_once = (sum(need.states for need in fit)
               + max(need.total - need.states for need in fit)) <= most
    return scale, variants, at_once
