"""Seconds of an optimizer's step over one flat tensor, as ZeRO steps it: torch's loop, torch's
fused kernel, DeepSpeed's CPU Adam."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from amid_ds.bench.measure import slowest_rank_seconds
from amid_ds.distributed.world import World
from amid_ds.engine.cpu_adam import cpu_adam_problems, new_cpu_adam

ROUNDS = 5


def optimizer_seconds(world: World, elements: int) -> dict[str, float | None]:
    """Median seconds of a step of `elements` fp32 weights, by optimizer. Collective.

    `loop` is torch's AdamW one operation after another, `fused` its one kernel, both on this rank's
    device; `fused_host` and `cpu_adam` are of offloaded state, in host memory. None where it could
    not be compiled.
    """
    host = torch.device("cpu")
    optimizers: dict[str, tuple[Callable[..., torch.optim.Optimizer], torch.device]] = {
        "loop": (lambda rows: torch.optim.AdamW(rows, foreach=False), world.device),
        "fused": (lambda rows: torch.optim.AdamW(rows, fused=True), world.device),
        "fused_host": (lambda rows: torch.optim.AdamW(rows, fused=True), host),
        "cpu_adam": (lambda rows: new_cpu_adam(rows), host)}
    has_cpu_adam = not cpu_adam_problems(world)
    return {name: _median_seconds(world, make, elements, device)
            if has_cpu_adam or name != "cpu_adam" else None
            for name, (make, device) in optimizers.items()}


def _median_seconds(world: World, make: Callable[..., torch.optim.Optimizer], elements: int,
                    device: torch.device) -> float:
    """Of the slowest rank, after a step that makes the state. Collective."""
    generator = torch.Generator(device).manual_seed(world.rank)
    row = torch.nn.Parameter(torch.randn(elements, device=device, generator=generator))
    row.grad = torch.randn(elements, device=device, generator=generator)
    step = make([row]).step
    seconds = [slowest_rank_seconds(world, step) for _ in range(1 + ROUNDS)]
    return statistics.median(seconds[1:])
