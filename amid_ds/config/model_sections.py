"""The recipe's `student` and `teacher` sections: which models, and how they are held and trained.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from pydantic import Discriminator, Field, Tag, model_validator

from amid_ds.config.section import (
    BelowOne,
    Decay,
    NonNegative,
    PathText,
    Positive,
    PositiveInt,
    Section,
)

Dtype = Literal["auto", "bf16", "fp32"]


class HubKwargs(TypedDict):
    """The arguments of transformers' `from_pretrained` that say which files of a model to open."""

    revision: str | None
    trust_remote_code: bool


class PretrainedModel(Section):
    """A causal language model: a folder, or an id on the hub."""

    model: PathText
    """The folder's path, or the id."""
    revision: str | None = None
    """The commit, branch or tag of a model on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the weights."""

    @property
    def hub_kwargs(self) -> HubKwargs:
        """Keyword arguments for transformers, to go with the model's name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class Lora(Section):
    """Low-rank adapters in the student, trained in the place of its own weights (2106.09685)."""

    rank: PositiveInt = 16
    """Of the two matrices of an adapter."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    """Of an adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers that get one; all-linear: all but the output head."""
    modules_to_save: list[str] = Field(default=[])
    """Modules that are trained whole beside the adapters."""

    @model_validator(mode="after")
    def _names_something(self) -> Lora:
        if not self.targets or not all([*self.targets, *self.modules_to_save]):
            raise ValueError("`targets` and `modules_to_save` are names of modules, and one is "
                             "empty; name linear layers, or set `targets: all-linear`")
        return self


class Student(PretrainedModel):
    """The model that is trained."""

    dtype: Dtype = "auto"
    """Of the weights; auto: the DeepSpeed config's."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    lora: Lora | None = None
    """Train low-rank adapters alone."""
    freeze: list[str] = Field(default=[])
    """Patterns of the names of parameters that are not trained."""
    router_aux_loss: Literal["auto"] | NonNegative = "auto"
    """The weight of a mixture's load-balancing loss; auto: its config's."""

    @model_validator(mode="after")
    def _freezes_one_way(self) -> Student:
        if self.lora is not None and self.freeze:
            raise ValueError("`lora` with `freeze`: with adapters everything else is frozen "
                             "already; leave `freeze` out, and name less in `lora.targets`")
        if not all(self.freeze):
            raise ValueError("`freeze` has an empty pattern; name parameters, or leave it out")
        return self


class Delta(Section):
    """What the teacher learnt since its base, carried over to the student's base (2509.14526)."""

    base: PretrainedModel
    """The model that the teacher was made from."""
    student_base: PretrainedModel | None = None
    """The model that the shift is added to; None: the student as it begins."""
    scale: NonNegative = 1.0
    """The shift is multiplied by it."""

    def trusting_none(self) -> Delta:
        """The same without leave to run the code that comes with its models."""
        bases = {name: base.model_copy(update={"trust_remote_code": False})
                 for name, base in self.bases.items()}
        return self.model_copy(update=bases)

    @property
    def bases(self) -> dict[str, PretrainedModel]:
        """The models that it names, by key."""
        named = {"base": self.base, "student_base": self.student_base}
        return {name: base for name, base in named.items() if base is not None}


class Teacher(PretrainedModel):
    """The model that is distilled from."""

    dtype: Dtype = "auto"
    """Of the weights; auto: the checkpoint's."""
    placement: Literal["auto", "zero3", "node", "replicated"] = "auto"
    """zero3: sharded over all ranks; node: over those of each node; replicated: whole on every
    rank, never gathered; auto: by the plan the fastest of those that fit."""
    shard_over: PositiveInt | None = None
    """Neighbouring data-parallel ranks over which `node` shards it; None: those of a node."""
    max_tokens_per_pass: PositiveInt | None = None
    """The most tokens of an optimizer step in one forward pass; None: by free memory."""
    vocabulary: Literal["same", "grown"] = "same"
    """same: the student's tokenizer is the teacher's; grown: it has further tokens behind it."""
    delta: Delta | None = None
    """Distil from the student's base plus what the teacher learnt since its own base."""

    @model_validator(mode="after")
    def _shards_over_neighbours(self) -> Teacher:
        if self.shard_over is not None and self.placement not in ("auto", "node"):
            raise ValueError(f"`shard_over` {self.shard_over} with `placement: {self.placement}`, "
                             "which has no ranks to choose; leave it out, or set `placement: node`")
        return self


class CachedTeacher(Section):
    """A teacher whose distributions `amid-ds cache` has written down: it is not loaded."""

    cached: PathText
    """The folder that the command wrote."""
    rest: Literal["ghost", "spread", "drop"] | None = None
    """What the teacher is outside of what is kept; None: ghost of `--topk`, drop of `--sample`."""


class MeanTeacher(Section):
    """The student's own running mean as its teacher."""

    ema: Decay
    """The mean's decay in each optimizer step, above 0 and below 1."""


# By pydantic's name for the kind of teacher, which stands in the place of an error.
TEACHER_SECTIONS: dict[str, type[Section]] = {
    "a model": Teacher, "a cache": CachedTeacher, "a running mean": MeanTeacher}
_MODEL, _CACHE, _MEAN = TEACHER_SECTIONS


def _kind_of_teacher(value: object) -> str:
    """By the key that one kind alone has."""
    if isinstance(value, CachedTeacher) or (isinstance(value, dict) and "cached" in value):
        return _CACHE
    if isinstance(value, MeanTeacher) or (isinstance(value, dict) and "ema" in value):
        return _MEAN
    return _MODEL


AnyTeacher = Annotated[
    Annotated[Teacher, Tag(_MODEL)] | Annotated[CachedTeacher, Tag(_CACHE)]
    | Annotated[MeanTeacher, Tag(_MEAN)], Discriminator(_kind_of_teacher)]
