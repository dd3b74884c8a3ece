"""A run's plan compared with the run's own measurement (`amid-ds plan --check`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from amid_ds.config.parse import parse_recipe
from amid_ds.errors import InputError
from amid_ds.monitor.memory_probe import Measurements, read_measurements
from amid_ds.planning.devices import DEVICES, device_by_torch_name, find_device
from amid_ds.planning.estimate import Plan, estimate_plan
from amid_ds.run.log import read_metrics

# Logged steps of a run, the last ones, whose median time is compared.
MEASURED_STEPS = 20


class PlannedAndMeasured(TypedDict):
    """Bytes or seconds; None: not planned, or not measured."""

    planned: float | None
    measured: float | None


# By section (`memory_per_rank`, `network_per_step`, `seconds`) and part.
Comparison = dict[str, dict[str, PlannedAndMeasured]]


def plan_measured_run(measured: Measurements, device: str | None = None,
                      trust_remote_code: bool = False) -> Plan:
    """The plan, without remedies, of the run that left `measured`, on as many ranks as it had.

    `device`: as find_device reads it; None: the run's own. Raises InputError where that is not in
    the table, its models are elsewhere by now, or they come with code that may not run here.
    """
    ranks, nodes = len(measured.hosts), len(set(measured.hosts))
    ranks_per_node = ranks // nodes
    known = (find_device(device, ranks_per_node) if device
             else device_by_torch_name(measured.device, ranks_per_node))
    if known is None:
        raise InputError(f"the run was on {measured.device}",
                         f"one of {', '.join(DEVICES)}, or cpu",
                         "give its numbers by --device '{memory: …, flops: …, bandwidth: …}'")
    recipe = parse_recipe(measured.recipe, "the recipe of the run that was measured")
    recipe = recipe.trusting(trust_remote_code)
    return estimate_plan(recipe, nodes, ranks, known)


def check_plan(run: Path, device: str | None, trust_remote_code: bool = False) -> Comparison:
    """Planned and measured bytes and seconds of the run in the folder `run`.

    `device`: as find_device reads it; None: the run's own. Raises InputError where nothing was
    measured.
    """
    measured = read_measurements(run)
    plan = plan_measured_run(measured, device, trust_remote_code)
    times = [line["time/step"] for line in read_metrics(run)
             if line["step"] >= measured.step and line.get("time/step") is not None]
    if not times:
        raise InputError(f"{run} has no metrics", "metrics.jsonl with the steps that were measured",
                         "check the folder")
    step_seconds = statistics.median(times[-MEASURED_STEPS:])
    return {"memory_per_rank": _by_part(plan.memory_per_rank, measured.memory_per_rank),
            "network_per_step": _by_part(plan.network_per_step, measured.network_per_step),
            "seconds": _by_part({"step": plan.seconds_per_step}, {"step": step_seconds})}


def _by_part(planned: Mapping[str, float],
             measured: Mapping[str, float]) -> dict[str, PlannedAndMeasured]:
    """Both numbers of each part that either has."""
    return {part: {"planned": planned.get(part), "measured": measured.get(part)}
            for part in {**planned, **measured}}
