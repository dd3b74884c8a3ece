"""Whole tensors into the engine's partitions: weights, fp32 masters, and the optimizer's moments
and running means.

This is how a checkpoint of one layout resumes in another. Every rank reads whole tensors and keeps
the part that its own layout (ZeRO stage, data-parallel and tensor-parallel rank) asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from amid_ds.engine.body_split import own_part
from amid_ds.engine.optimizer import inner_optimizer, step_count
from amid_ds.errors import TrainingError

# The module of an engine names its parameters student.… and teacher.…
STUDENT_PREFIX = "student."
# DeepSpeed's names for a parameter's fp32 weights, its two moments of Adam's, or one of Muon's.
WEIGHT_KIND, ADAM_KINDS, MUON_KINDS = "fp32", ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
# Ours, of the running means (ema.py).
EXPORTED_MEAN, TEACHING_MEAN = "ema", "teacher_ema"
MEAN_KINDS = (EXPORTED_MEAN, TEACHING_MEAN)
TENSOR_KINDS = (WEIGHT_KIND, *ADAM_KINDS, *MUON_KINDS, *MEAN_KINDS)


def load_tensors(deepspeed_engine: Any, read: Callable[[str], Mapping[str, Tensor]], step: int,
                 means: Iterable[str] = ()) -> None:
    """Fill weights and optimizer from whole tensors, as of optimizer step `step`.

    read(name): the parameter's whole tensors by TENSOR_KINDS; `name` is that of the student's
    model. means: the MEAN_KINDS that this run keeps; one that there is not yet begins with the
    weights. Raises TrainingError where the tensors are another optimizer's.
    """
    trained: dict[str, Any] = {name.removeprefix(STUDENT_PREFIX): parameter for name, parameter
                               in deepspeed_engine.module.named_parameters()
                               if parameter.requires_grad}
    means = tuple(means)
    masters = _fill_optimizer_state(deepspeed_engine, trained, step, means)
    kinds = {name: MUON_KINDS if group["name"] == "muon" else ADAM_KINDS
             for group in deepspeed_engine.optimizer.param_groups for name in group["names"]}
    for name, parameter in trained.items():
        tensors = read(name)
        if tensors.keys() - set(MEAN_KINDS) != {WEIGHT_KIND, *kinds[name]}:
            raise TrainingError(f"the checkpoint has {', '.join(sorted(tensors))} of {name}, this "
                                f"optimizer has {', '.join(kinds[name])}")
        tensors = {kind: tensors.get(kind, tensors[WEIGHT_KIND])
                   for kind in (WEIGHT_KIND, *kinds[name], *means)}
        own = {kind: own_part(parameter, tensor) for kind, tensor in tensors.items()}
        if hasattr(parameter, "ds_tensor"):
            _set_zero3_partition(parameter, own)
        else:
            _set_unpartitioned(deepspeed_engine, parameter, masters.get(parameter), own)
    if deepspeed_engine.zero_optimization_stage() == 3:
        # Those of the weights before.
        deepspeed_engine.optimizer.invalidate_secondary_tensor()
    deepspeed_engine.global_steps = step


def _fill_optimizer_state(deepspeed_engine: Any, trained: Mapping[str, Any], step: int,
                          means: tuple[str, ...]) -> dict[Any, Tensor]:
    """Give the fresh optimizer a state of zeros; returns the parameters' fp32 masters at stage 0.

    ZeRO's optimizers step over flat rows of this rank's pieces, which DeepSpeed's setters address.
    trained: the parameters by their names in the student.
    """
    optimizer, adam = deepspeed_engine.optimizer, inner_optimizer(deepspeed_engine)
    stage = deepspeed_engine.zero_optimization_stage()
    masters: dict[Any, Tensor] = {}
    if stage == 3:
        rows = optimizer.fp32_partitioned_groups_flat
    elif stage:
        rows = optimizer.single_partition_of_fp32_groups
    else:
        masters = whole_masters(deepspeed_engine, trained)
        rows = masters.values()
    for row in rows:
        if MUON_KINDS[0] in adam.state.get(row, {}):
            # Made with the engine.
            adam.state[row][MUON_KINDS[0]].zero_()
        else:
            adam.state[row] = {"step": step_count(adam, row, step),
                               **{kind: torch.zeros_like(row) for kind in ADAM_KINDS}}
        adam.state[row] |= {kind: torch.zeros_like(row) for kind in means}
    if stage in (1, 2):
        # DeepSpeed's setters know of these moments only after this.
        optimizer._lazy_init_hp_params_optimizer_state()
    return masters


def whole_masters(deepspeed_engine: Any, trained: Mapping[str, Any]) -> dict[Any, Tensor]:
    """The fp32 weights that the optimizer steps, by parameter, at stage 0: nothing is partitioned.

    trained: the parameters by their names in the student.
    """
    optimizer = deepspeed_engine.optimizer
    # Group by group, as the optimizer has them.
    own = [trained[name] for group in optimizer.param_groups for name in group["names"]]
    rows = [row for group in getattr(optimizer, "fp32_groups", [own]) for row in group]
    return dict(zip(own, rows, strict=True))


@torch.no_grad()
def _set_zero3_partition(parameter: Any, tensors: Mapping[str, Tensor]) -> None:
    """Set this rank's piece: ZeRO-3 cuts a parameter into equal pieces, the last one padded."""
    from deepspeed import comm, utils

    size = parameter.ds_tensor.numel()
    start = size * comm.get_rank(group=parameter.ds_process_group)
    pieces = {}
    for kind, tensor in tensors.items():
        piece = tensor.flatten()[start:start + size]
        pieces[kind] = torch.nn.functional.pad(piece, (0, size - piece.numel()))
    utils.safe_set_local_fp32_param(parameter, pieces[WEIGHT_KIND])
    for kind in pieces.keys() - {WEIGHT_KIND}:
        utils.safe_set_local_optimizer_state(parameter, pieces[kind], kind)
    parameter.ds_tensor.data.copy_(pieces[WEIGHT_KIND])


@torch.no_grad()
def _set_unpartitioned(deepspeed_engine: Any, parameter: Any, master: Tensor | None,
                       tensors: Mapping[str, Tensor]) -> None:
    """Set a parameter that every rank holds whole (below stage 3), its master and its moments."""
    from deepspeed import utils

    parameter.data.copy_(tensors[WEIGHT_KIND])
    if master is None:
        utils.safe_set_full_fp32_param(parameter, tensors[WEIGHT_KIND])
        for kind in tensors.keys() - {WEIGHT_KIND}:
            utils.safe_set_full_optimizer_state(parameter, tensors[kind], kind)
        return
    master.data.copy_(tensors[WEIGHT_KIND])
    adam = inner_optimizer(deepspeed_engine)
    for kind in tensors.keys() - {WEIGHT_KIND}:
        adam.state[master][kind].copy_(tensors[kind])
