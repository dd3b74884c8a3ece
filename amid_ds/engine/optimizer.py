"""The student's optimizer: its groups of parameters, who steps them, and their state.

AdamW is torch's with fused=True, on a GPU as on a CPU. ZeRO keeps a group as one flat fp32 tensor
on each rank, so a step is one kernel that reads and writes each number once; DeepSpeed's FusedAdam
makes the same pass, and needs nvcc at the first run. Offloaded state is stepped by DeepSpeed's CPU
Adam (cpu_adam.py), or by torch's where that cannot be compiled. Muon is DeepSpeed's (muon.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from amid_ds.config.recipe import Recipe, Train
from amid_ds.distributed.world import World
from amid_ds.engine.cpu_adam import load_cpu_adam, new_cpu_adam
from amid_ds.engine.gather import full_shape
from amid_ds.errors import TrainingError
from amid_ds.models.shape import embedding_of, head_module

# `plain` is not decayed. In this order in the optimizer, and so in a checkpoint's files.
GroupName: TypeAlias = Literal["muon", "decayed", "plain"]
# The parameters that a recipe decays: all of them, or `decayed` and `muon` alone.
DecayedParameters: TypeAlias = Literal["all", "matrices"]
GROUP_NAMES: tuple[GroupName, ...] = ("muon", "decayed", "plain")


def parameter_groups(student: nn.Module, train: Train) -> dict[str, GroupName]:
    """The group of each parameter that trains, by its name in `student`, in the model's order.

    Decayed are tensors of at least two dimensions that are neither an embedding nor tied to one, or
    all with `decay_all`. Muon's are those of them that are not the head's. student: whole, on the
    meta device, or in ZeRO-3's shards; before tensor parallelism cuts its head.
    """
    embeddings = _embedding_parameters(student)
    head = set(head_module(student).parameters())
    groups: dict[str, GroupName] = {}
    for name, parameter in student.named_parameters():
        # ZeRO-3 flattens what a rank holds, and keeps the shape beside it.
        dimensions = len(full_shape(parameter))
        is_matrix = dimensions >= 2 and parameter not in embeddings
        if not parameter.requires_grad:
            continue
        if is_matrix and train.optimizer == "muon" and parameter not in head:
            groups[name] = "muon"
        else:
            groups[name] = "decayed" if is_matrix or train.decay_all else "plain"
    return groups


def _embedding_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those of every embedding of the model, of positions too; a tied head's weight is one."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules.append(embedding_of(model))
    return {parameter for module in modules for parameter in module.parameters()}


def group_counts(student: nn.Module, train: Train) -> dict[str, dict[str, int]]:
    """By group, the number of its `tensors` and of their `elements`; student: a whole model.

    What does not train is in no group, and counted as `frozen`.
    """
    counts: dict[str, dict[str, int]] = {}
    parameters = dict(student.named_parameters())
    groups: dict[str, str] = {**parameter_groups(student, train)}
    groups |= {name: "frozen" for name in parameters if name not in groups}
    for name, group in groups.items():
        of_group = counts.setdefault(group, {"tensors": 0, "elements": 0})
        of_group["tensors"] += 1
        of_group["elements"] += parameters[name].numel()
    return counts


def make_optimizer(student: nn.Module, groups: Mapping[str, GroupName], train: Train,
                   offloaded: bool, world: World) -> torch.optim.Optimizer:
    """The student's optimizer, before DeepSpeed takes it. Collective.

    groups: `parameter_groups` of the student. Each of the optimizer's groups keeps, beside its
    options, its `name`, the `names` of its parameters and its `ratio` of the learning rate, so that
    checkpoints have them too.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            members[groups[name]].append((name, parameter))
    param_groups: list[dict[str, Any]] = [
        {"params": [parameter for _, parameter in named], "name": group,
         "names": [name for name, _ in named], "ratio": 1.0,
         # A step of DeepSpeed's own, to make the state, moves nothing. Each step sets its rate.
         "lr": 0.0, "weight_decay": 0.0 if group == "plain" else train.weight_decay,
         "betas": tuple(train.betas), "eps": train.eps}
        for group, named in members.items() if named]
    if train.optimizer == "muon":
        from amid_ds.engine.muon import make_muon

        return make_muon(param_groups, train)
    if offloaded and load_cpu_adam(world):
        return new_cpu_adam(param_groups)
    return torch.optim.AdamW(param_groups, fused=True)


def steps_on_cpu(adam: Any) -> bool:
    """True for DeepSpeed's CPU Adam."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return isinstance(adam, DeepSpeedCPUAdam)


def inner_optimizer(deepspeed_engine: Any) -> Any:
    """The optimizer that `make_optimizer` made, out of DeepSpeed's own around it."""
    outer = deepspeed_engine.optimizer
    return getattr(outer, "optimizer", outer)


def step_count(adam: Any, row: torch.Tensor, step: int) -> int | torch.Tensor:
    """`step` as `adam` counts the steps of the flat tensor `row`."""
    if steps_on_cpu(adam):
        return step
    # A fused kernel reads it where the row is.
    return torch.tensor(float(step), device=row.device)


def recount_steps(adam: Any, step: int | None = None) -> None:
    """Set all counts of `adam` to `step`; None: to their own values, in the form of this optimizer,
    where the state is another one's."""
    for row, values in adam.state.items():
        if "step" in values:
            values["step"] = step_count(adam, row, int(values["step"]) if step is None else step)


@contextlib.contextmanager
def options_kept(deepspeed_engine: Any) -> Iterator[None]:
    """A context that loads a checkpoint's optimizer: its state, and not its options.

    The options (betas, decay, whose kernel) are this run's recipe's. Raises TrainingError where a
    group of the checkpoint has other parameters.
    """
    outer, adam = deepspeed_engine.optimizer, inner_optimizer(deepspeed_engine)
    # ZeRO-1 and 2 take it from the checkpoint.
    clipping = getattr(outer, "clip_grad", None)
    options = [{key: value for key, value in group.items() if key != "params"}
               for group in adam.param_groups]
    dtypes = {row: values["momentum_buffer"].dtype for row, values in adam.state.items()
              if "momentum_buffer" in values}
    yield
    for group, own in zip(adam.param_groups, options, strict=True):
        # Checkpoints of version 0.1 have one group, and no names.
        if sorted(group.get("names", own["names"])) != sorted(own["names"]):
            raise TrainingError(f"the optimizer's group `{own['name']}` has other parameters in "
                                "the checkpoint: is the student another model?")
        for key in group.keys() - own.keys() - {"params"}:
            del group[key]
        group.update(own)
    recount_steps(adam)
    for row, dtype in dtypes.items():
        # torch makes it fp32, as the row is.
        adam.state[row]["momentum_buffer"] = adam.state[row]["momentum_buffer"].to(dtype)
    if clipping is not None:
        outer.clip_grad = clipping


def decayed_parameters(recipe: Recipe) -> DecayedParameters:
    """The recipe's rule of decay, by which a checkpoint's parameters are in one group or two."""
    return "all" if recipe.train.decay_all else "matrices"
