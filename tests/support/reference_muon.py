"""Muon in plain torch, from its authors' description: momentum, Newton-Schulz, the step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.reference_loop import reference_adamw


def muon_step(gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """The step of a matrix, and in place its momentum: Nesterov's, by the nearest orthogonal one.

    Five Newton-Schulz iterations (Jordan et al., 2024), the wide way round, scaled by the shape.
    """
    momentum.lerp_(gradient, 1 - beta)
    step = torch.lerp(gradient, momentum, beta)
    is_tall = step.shape[0] > step.shape[1]
    x = step.T if is_tall else step
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if is_tall else x) * max(1, step.shape[0] / step.shape[1]) ** 0.5


class ReferenceMuon(torch.optim.Optimizer):
    """`muon_step` for the matrices of a body, torch's AdamW for all else."""

    def __init__(self, model: nn.Module, train: dict) -> None:
        self.decay, self.beta = train["weight_decay"], train["muon"]["momentum"]
        self.adamw = reference_adamw(model, train)
        matrices = [parameter for name, parameter in model.named_parameters()
                    if ".layers." in name and parameter.dim() == 2]
        ratio = train["muon"]["learning_rate"] / train["learning_rate"]
        super().__init__([{"params": matrices, "ratio": ratio}], {})
        self.of_muon, = self.param_groups
        for group in self.adamw.param_groups:
            group["params"] = [parameter for parameter in group["params"]
                               if all(parameter is not other for other in matrices)]
        # Their learning rates are set with this optimizer's.
        self.param_groups = [*self.adamw.param_groups, self.of_muon]

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        rate = self.of_muon["lr"]
        for matrix in self.of_muon["params"]:
            gradient = matrix.grad.double()
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(gradient))
            matrix.mul_(1 - rate * self.decay)
            matrix.sub_(rate * muon_step(gradient, momentum, self.beta))
