"""Running means of the student's weights: the mean that is exported, and the one that teaches.

A mean is kept in fp32 beside the optimizer's own fp32 weights, as one more tensor of the
optimizer's state: so ZeRO shards it, checkpoints hold it and another layout takes it over like a
moment of Adam's. After each step of the optimizer, mean ← decay · mean + (1 - decay) · weights,
number by number: no rank asks another. It begins as the student's start, without a correction of
its bias: there is none, as the start is no zero. A step that was not taken changes no mean.

A teacher that is a mean is a second module of the student's architecture, partitioned as the
student is. Its partitions are filled anew from this rank's mean, in the model's dtype, as soon as
that has changed: at ZeRO stage 3 before DeepSpeed gathers the small weights that stay whole. Of
stages 1 and 2, where models are whole and means are not, it would need a gather: they are refused
(ds_config.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amid_ds.config.recipe import MeanTeacher, Recipe
from amid_ds.engine.gather import release_whole
from amid_ds.engine.optimizer import inner_optimizer
from amid_ds.engine.restore import EXPORTED_MEAN, MEAN_KINDS, TEACHING_MEAN, whole_masters


def mean_decays(recipe: Recipe) -> dict[str, float]:
    """The decay of each mean that the recipe keeps, by its kind, of MEAN_KINDS."""
    decays = {} if recipe.train.ema is None else {EXPORTED_MEAN: recipe.train.ema}
    if isinstance(recipe.teacher, MeanTeacher):
        decays[TEACHING_MEAN] = recipe.teacher.ema
    return decays


class _Copy(NamedTuple):
    """What of the teacher follows a part of an fp32 row of the optimizer's: `values` [n] are those
    from `start` on."""

    values: Tensor
    start: int


class RunningMeans:
    """The means of one engine's student; decays: by kind, of MEAN_KINDS, those that it keeps.

    teacher: the module that is the mean of TEACHING_MEAN; None where another teaches, or none.
    """

    def __init__(self, deepspeed_engine: Any, decays: Mapping[str, float]) -> None:
        self.decays, self._adam = decays, inner_optimizer(deepspeed_engine)
        self._starts: dict[tuple[str, Tensor], Tensor] = {}
        self._copies: dict[Tensor, list[_Copy]] = {}
        if TEACHING_MEAN in decays:
            self._teacher = deepspeed_engine.module.teacher
            self._copies = _copies(deepspeed_engine, deepspeed_engine.module.student,
                                   self._teacher)
        if decays:
            self._adam.register_step_pre_hook(self._keep_starts)
            self._adam.register_step_post_hook(self._follow)
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """After a start or a load: means that this run does not keep go, and the teacher is what
        its mean is; where there is no mean yet, the student itself."""
        for state in self._adam.state.values():
            for kind in set(MEAN_KINDS) - self.decays.keys():
                state.pop(kind, None)
        for row in self._copies:
            self._teach(row, self._adam.state.get(row, {}).get(TEACHING_MEAN, row))
        if self._copies:
            release_whole(self._teacher)

    @torch.no_grad()
    def _keep_starts(self, adam: Any, *_: object) -> None:
        """Before a step of some rows: keep those of which there is no mean yet."""
        for row in _rows(adam):
            for kind in self.decays.keys() - self._adam.state.get(row, {}).keys():
                self._starts[kind, row] = row.detach().clone()

    @torch.no_grad()
    def _follow(self, adam: Any, *_: object) -> None:
        """After a step of some rows: their means, and what the teacher has of them."""
        for row in _rows(adam):
            state = self._adam.state[row]
            for kind, decay in self.decays.items():
                if kind not in state:
                    state[kind] = self._starts.pop((kind, row))
                state[kind].lerp_(row, 1 - decay)
            if row in self._copies:
                self._teach(row, state[TEACHING_MEAN])

    def _teach(self, row: Tensor, mean: Tensor) -> None:
        for values, start in self._copies[row]:
            values.copy_(mean.view(-1)[start:start + values.numel()].view(values.shape))


def _rows(adam: Any) -> Iterator[Tensor]:
    """The tensors that the optimizer steps now: ZeRO gives it one flat row after the other."""
    for group in adam.param_groups:
        yield from group["params"]


def _copies(deepspeed_engine: Any, student: nn.Module, teacher: nn.Module
            ) -> dict[Tensor, list[_Copy]]:
    """By fp32 row of the optimizer's, what of `teacher` follows it. Nothing is copied yet."""
    optimizer, own = deepspeed_engine.optimizer, dict(student.named_parameters())
    others: dict[str, Any] = dict(teacher.named_parameters())
    copies: dict[Tensor, list[_Copy]] = {}
    if deepspeed_engine.zero_optimization_stage() == 3:
        for name, parameter in own.items():
            number, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            values = others[name].ds_tensor.data
            assert values.numel() == size, "the mean's partitions are the student's"
            row = optimizer.fp32_partitioned_groups_flat[number]
            copies.setdefault(row, []).append(_Copy(values, start))
        return copies
    masters = whole_masters(deepspeed_engine, own)
    return {masters[parameter]: [_Copy(others[name].data, 0)] for name, parameter in own.items()}
