"""Plans and comparisons as tables, JSON and one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from amid_ds.config.parse import dump_recipe, resolved
from amid_ds.config.recipe import Recipe
from amid_ds.data import with_steps
from amid_ds.errors import printable
from amid_ds.planning.check import Comparison, PlannedAndMeasured
from amid_ds.planning.devices import EFFICIENCY, HEADROOM, Device
from amid_ds.planning.estimate import Plan, estimate_plan
from amid_ds.planning.placement import PlacementCosts

if TYPE_CHECKING:
    from rich.table import Table

GB, MB, TFLOP = 1e9, 1e6, 1e12
NOT_PREPARED = "not known before the data are prepared, by amid-ds prepare or train"
NO_REMEDY = "none of the usual changes makes it fit: more ranks, or a larger device"


def fit_summary(recipe: Recipe, nodes: int, ranks_per_node: int, device: Device) -> str:
    """One line: does `recipe` fit, its GB and time. Raises InputError as `make_setting` does."""
    plan = estimate_plan(with_steps(recipe), nodes, nodes * ranks_per_node, device)
    hours = f"hours {NOT_PREPARED}" if plan.hours is None else f"{plan.hours:,.1f} h"
    verdict = "fits" if plan.fits else "does not fit"
    advice = "" if plan.fits else "; amid-ds plan names the changes with which it would"
    return (f"{verdict} on {nodes * ranks_per_node} x {device.name} (--device): "
            f"{plan.memory_per_rank['total'] / GB:,.1f} of {device.memory / GB:,.0f} GB a rank, "
            f"about {plan.seconds_per_step:,.2f} s a step, {hours}{advice}")


def print_plan(plan: Plan, recipe: Recipe, as_json: bool) -> None:
    """Print the resolved recipe and its plan as a table, or as JSON alone."""
    if as_json:
        print(json.dumps({"recipe": resolved(recipe), **asdict(plan), "hours": plan.hours,
                          "mfu": plan.mfu, "tokens_per_day": plan.tokens_per_day}))
        return
    from amid_ds.run.console import PlainConsole

    print(printable(dump_recipe(recipe)))
    console = PlainConsole()
    console.print(_plan_table(plan))
    if plan.placements:
        console.print(_placement_table(plan))
        console.print(f"teacher.placement: {plan.placement}")
    if recipe.live_teacher is not None and recipe.live_teacher.vocabulary == "grown":
        console.print("the teacher reads the old pieces of new tokens: its rows are longer than "
                      "train.seq_length, at which they are counted")
    if len(plan.frozen_models) > 1:
        console.print(_frozen_table(plan))
    console.print(_work_line(plan, recipe))
    for line in _mixture_lines(plan):
        console.print(line)
    for name, parts in plan.whole_parts.items():
        if parts:
            console.print(f"{name}: every rank of a tensor-parallel group holds whole, and "
                          f"computes with, {'; '.join(map(str, parts))}")
    console.print(f"epochs by the last step: {_epochs_line(plan, recipe)}")
    console.print(_activations_line(plan))
    console.print(_reading_line(plan))
    console.print(_time_line(plan))
    for line in _fit_lines(plan):
        console.print(line)


def _plan_table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(title=f"{plan.ranks} rank(s) of {plan.device.name}, "
                        f"{plan.device.memory / GB:.0f} GB each")
    table.add_column("of one rank", justify="left")
    table.add_column("GB", justify="right")
    for name, size in plan.memory_per_rank.items():
        table.add_row(_words(name), f"{size / GB:,.2f}")
    table.add_section()
    for name, size in plan.network_per_step.items():
        is_part = name.endswith("_between_nodes")
        title = "  of these" if is_part else "received per step"
        table.add_row(f"{title}: {_words(name)}", f"{size / GB:,.2f}")
    return table


def _placement_table(plan: Plan) -> Table:
    """A line for each placement of the teacher that this layout may have."""
    from rich.table import Table

    table = Table(title="placements of the teacher, for one rank: GB held, and of the teacher "
                        "received from its own node and from others")
    for heading in ("", "held", "own node", "others", "s a step", "bound by", "fits"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for each in plan.placements:
        table.add_row(placement_title(each), f"{each.memory / GB:,.1f}",
                      f"{each.from_neighbours / GB:,.2f}", f"{each.from_other_nodes / GB:,.2f}",
                      f"{each.seconds:,.3g}", _words(each.binds),
                      "yes" if each.fits else "no")
    return table


def _frozen_table(plan: Plan) -> Table:
    """A line for each model of a teacher that has several."""
    from rich.table import Table

    table = Table(title="models of the teacher, for one rank: GB of weights held, TFLOP and GB "
                        "gathered in a step")
    for heading in ("", "parameters", "GB held", "TFLOP", "GB gathered"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for each in plan.frozen_models:
        table.add_row(each.key, f"{each.parameters:,}", f"{each.weight_bytes / GB:,.2f}",
                      f"{each.flops / TFLOP:,.2f}", f"{each.gathered_bytes / GB:,.2f}")
    return table


def placement_title(costs: PlacementCosts) -> str:
    """Its name, for `node` with the data-parallel ranks that share a copy."""
    return f"node ({costs.shard_over})" if costs.placement == "node" else costs.placement


def _reading_line(plan: Plan) -> str:
    read = plan.read_at_start
    again = "both again" if plan.parameters["frozen"] else "the teacher alone"
    return (f"read at the start: {read.student / GB:,.2f} GB of the student and "
            f"{read.teacher / GB:,.2f} of the teacher by each rank, about {read.seconds:,.1f} s "
            f"at {read.storage_bandwidth / GB:,.3g} GB/s a node (--storage); resumed, {again}, "
            f"{read.seconds_resumed:,.1f} s")


def _work_line(plan: Plan, recipe: Recipe) -> str:
    flops = {name: count / TFLOP for name, count in plan.flops_per_step.items()}
    steps = f"steps {NOT_PREPARED}" if plan.steps is None else f"{plan.steps:,} steps"
    if recipe.train.epochs is not None:
        steps += f" ({recipe.train.epochs} epochs)"
    return (f"{plan.tokens_per_step:,} tokens a step in {plan.micro_batches} micro-batch(es) "
            f"per rank, {steps}; per rank and step "
            f"{flops['student']:,.1f} TFLOP of the student and "
            f"{flops['teacher']:,.1f} of the teacher{_trained_part(plan)}")


def _mixture_lines(plan: Plan) -> Iterator[str]:
    """A line for each model with experts, and one for scans."""
    models = [("student", plan.parameters["held"], plan.parameters["active"],
               plan.expert_gather_bytes),
              *((each.key, each.parameters, each.active, each.expert_gather_bytes)
                for each in plan.frozen_models)]
    for key, held, active, gather in models:
        if gather:
            yield (f"{key}: parameters {held:,} held, {active:,} active; a layer's experts are "
                   f"gathered together, {gather / GB:,.2f} GB")
    if plan.fused_scans:
        yield (f"{' and '.join(plan.fused_scans)}: scans are counted as the kernels of mamba-ssm, "
               "causal-conv1d or flash-linear-attention do them; without these packages they keep "
               "many times more")


def _trained_part(plan: Plan) -> str:
    """What of a student trains that trains in part; else nothing."""
    trained, frozen = plan.parameters["trained"], plan.parameters["frozen"]
    return (f"; of the student {trained:,} weights are trained, {trained / (trained + frozen):.2%}"
            if frozen else "")


def _epochs_line(plan: Plan, recipe: Recipe) -> str:
    if plan.epochs is not None:
        return ", ".join(f"{source.path} {count:.3g}"
                         for source, count in zip(recipe.data.train, plan.epochs, strict=True))
    if recipe.data.streams:
        return "not known, the sources are streamed"
    return NOT_PREPARED


def _activations_line(plan: Plan) -> str:
    without = plan.activations["without_checkpointing"] / GB
    checkpointed = plan.activations["with_checkpointing"] / GB
    return (f"activations: {without:,.2f} GB without checkpointing; {checkpointed:,.2f} GB with "
            "it, one recomputed layer included")


def _time_line(plan: Plan) -> str:
    hours = ("" if plan.hours is None else
             f", {plan.hours:,.1f} h, {plan.hours * plan.ranks:,.0f} rank-hours")
    parts = "; ".join(
        f"{model}: " + ", ".join(f"{_words(what)} {seconds:,.2f}" for what, seconds in each.items())
        for model, each in plan.seconds_by_model.items())
    return (f"about {plan.seconds_per_step:,.2f} s a step, bound by {_words(plan.binds)} "
            f"({parts}), {plan.tokens_per_day / 1e9:,.2f} G tokens a day ({plan.mfu:.0%} MFU; "
            f"assumed: {EFFICIENCY:.0%} of the peak in products, links at full speed and all three "
            f"overlapped){hours}; a checkpoint of {plan.checkpoint_bytes / GB:,.1f} GB")


def _fit_lines(plan: Plan) -> Iterator[str]:
    """The verdict and, where the plan does not fit, the remedies."""
    needed, memory = plan.memory_per_rank["total"] / GB, plan.device.memory / GB
    if plan.fits:
        yield f"fits: {needed:,.1f} of {memory:,.0f} GB"
        return
    yield (f"does not fit: {needed:,.1f} GB, and {HEADROOM:.0%} of {memory:,.0f} GB may be "
           "planned for")
    for remedy in plan.remedies or [NO_REMEDY]:
        yield f"  - {remedy}"


def print_check(comparison: Comparison, as_json: bool) -> None:
    """Print the prediction beside the measurement as a table, or as JSON alone."""
    if as_json:
        print(json.dumps(comparison))
        return
    from rich.table import Table

    from amid_ds.run.console import PlainConsole

    table = Table()
    table.add_column("", justify="left")
    for heading in ("planned", "measured", "difference"):
        table.add_column(heading, justify="right")
    for section, parts in comparison.items():
        unit, symbol = (1.0, "s") if section == "seconds" else (MB, "MB")
        for part, pair in parts.items():
            table.add_row(f"{_words(part)}, {symbol}", *_check_cells(pair, unit))
        table.add_section()
    PlainConsole().print(table)


def _check_cells(pair: PlannedAndMeasured, unit: float) -> list[str]:
    """Both numbers in `unit`, and their difference in percent; a dash for what is missing."""
    planned, measured = pair["planned"], pair["measured"]
    cells = ["–" if size is None else f"{size / unit:,.3f}" for size in (planned, measured)]
    return [*cells, f"{planned / measured - 1:+.1%}" if planned and measured else "–"]


def _words(part: str) -> str:
    return part.replace("_", " ")
