"""Muon for the matrices of the student's body: DeepSpeed's own, under ZeRO-3.

It gathers each matrix's gradient, folds it into a momentum that is partitioned like the weights,
and steps along the nearest orthogonal matrix (Jordan et al., 2024). DeepSpeed takes the gradient's
norm over these steps, and would clip them by it: their norm is the root of the matrices' rank,
whatever the gradient. `clip_gradients_first` makes the norm, and the clipping, the gradient's own.
"""

from __future__ import annotations

from typing import Any

import torch

from amid_ds.config.recipe import Train


def make_muon(param_groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    """DeepSpeed's Muon over these groups: Muon for the one of that name, AdamW for the others."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    assert train.muon is not None, "the recipe's Muon has its keys"
    for group in param_groups:
        group["use_muon"] = group["name"] == "muon"
        if group["use_muon"]:
            group |= {"momentum": train.muon.momentum, "ratio": train.muon_ratio}
            del group["betas"], group["eps"]
        for parameter in group["params"]:
            # By the parameter ZeRO-3 knows which of its flat rows are Muon's.
            parameter.use_muon = group["use_muon"]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        param_groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})
    return optimizer


def clip_gradients_first(zero_optimizer: Any) -> None:
    """Have ZeRO-3's step take norm and clipping of the gradients, before Muon makes its steps."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    orthogonalize = zero_optimizer._apply_muon_to_accumulated_grads
    take_norms, clip = zero_optimizer._get_norm_groups, zero_optimizer.unscale_and_clip_grads
    norms: list[torch.Tensor] = []

    def clip_and_orthogonalize() -> None:
        norms[:] = take_norms()
        limit = zero_optimizer.clip_grad
        if limit > 0:
            # As DeepSpeed and torch clip.
            factor = (limit / (combine_grad_norm_groups(norms) + 1e-6)).clamp(max=1.0)
            for sub_group in _muons(zero_optimizer):
                for gradient in zero_optimizer.averaged_gradients[sub_group]:
                    gradient.mul_(factor)
        orthogonalize()

    def clip_adamws(sub_group: int, norm: torch.Tensor) -> None:
        if sub_group not in _muons(zero_optimizer):
            clip(sub_group, norm)

    zero_optimizer._apply_muon_to_accumulated_grads = clip_and_orthogonalize
    zero_optimizer._get_norm_groups = lambda: norms
    zero_optimizer.unscale_and_clip_grads = clip_adamws


def _muons(zero_optimizer: Any) -> list[int]:
    """The flat rows of ZeRO-3's that are Muon's, by number."""
    return [number for number, is_muons in enumerate(zero_optimizer.sub_groups_using_muon)
            if is_muons]
