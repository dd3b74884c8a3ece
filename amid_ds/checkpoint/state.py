"""Where a run stands, and the layout that its shards were saved in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from amid_ds.config.schedule import TaidState
from amid_ds.data import StreamState
from amid_ds.distributed.world import World
from amid_ds.engine.optimizer import DecayedParameters
from amid_ds.models.tensor_parallel import HEAD_ROW_MULTIPLE


class RolloutState(TypedDict):
    """DistiLLM's adaptive scheme: the threshold, and the validation loss to compare with."""

    threshold: float
    loss: float


class BestState(TypedDict):
    """The best evaluation so far.

    of: what is compared, see checkpoint/best.py. value, step: of the best one; None while none had
    a value. since: evaluations after it.
    """

    of: str
    value: float | None
    step: int | None
    since: int


# Names that version 0.1 wrote first; kept so that all its checkpoints read alike.
_MANIFEST_NAMES = {"teacher_tokens_per_pass": "tokens_per_pass", "taid": "interpolation"}


@dataclass
class TrainState:
    """Everything beside weights, optimizer and the recipe that the next step depends on.

    step: optimizer steps done. tokens: valid tokens learnt from. teacher_tokens_per_pass: tokens
    that share a forward call of the teacher (None: not chosen yet). taid, rollout, streams, best:
    the state of TAID's interpolation, of adaptive rollouts, of streamed sources by their number,
    and of `checkpoint.best`; None without.
    """

    step: int = 0
    tokens: int = 0
    teacher_tokens_per_pass: int | None = None
    taid: TaidState | None = None
    rollout: RolloutState | None = None
    streams: StreamState | None = None
    best: BestState | None = None

    def to_json(self) -> dict[str, object]:
        """The fields as a manifest has them, without those that are None."""
        return {_MANIFEST_NAMES.get(name, name): value for name, value in vars(self).items()
                if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        """The state that `to_json` gave; further keys of a manifest are ignored."""
        fields = {name: values.get(_MANIFEST_NAMES.get(name, name))
                  for name in cls.__dataclass_fields__}
        return cls(**fields)   # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """The facts by which DeepSpeed lays a model out over its files."""

    ranks: int
    tensor_parallel: int
    zero_stage: int
    student_dtype: str
    # The multiple of rows at which a tensor-parallel group has cut the heads; 1 without a group.
    # Manifests that do not name these two are older than them: heads were cut as evenly as
    # possible, and all parameters decayed.
    head_row_multiple: int = 1
    decayed: DecayedParameters = "all"
    # What a tensor-parallel group has split of the body, see `split_kinds`. Where a manifest does
    # not name it, each was cut in one piece, and the shapes tell what was.
    split: tuple[str, ...] = ()
    expert_parallel: int = 1

    @classmethod
    def of(cls, world: World, zero_stage: int, student_dtype: str,
           decayed: DecayedParameters, split: tuple[str, ...]) -> Layout:
        """The layout that a run has on these ranks."""
        return cls(world.size, world.tp_size, zero_stage, student_dtype,
                   HEAD_ROW_MULTIPLE if world.tp_size > 1 else 1, decayed, split,
                   1 if world.experts is None else world.experts.exchange.size())

    def to_json(self) -> dict[str, object]:
        """The fields as a manifest has them; those that an older one lacks only where they differ
        from what it meant."""
        return {field.name: value for field in fields(self)
                if (value := getattr(self, field.name)) != field.default}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` gave; further keys of a manifest are ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "split": tuple(known.get("split", ()))})

    def __str__(self) -> str:
        cut = (f" (heads cut at multiples of {self.head_row_multiple} rows, "
               f"{len(self.split)} kinds of weights split)"
               if self.tensor_parallel > 1 else "")
        experts = f"expert_parallel {self.expert_parallel}, " if self.expert_parallel > 1 else ""
        return (f"{self.ranks} rank(s), tensor_parallel {self.tensor_parallel}{cut}, {experts}"
                f"ZeRO stage {self.zero_stage}, {self.student_dtype}, "
                f"weight decay of {self.decayed}")
