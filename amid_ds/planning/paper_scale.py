"""`amid-ds plan --paper-scale`: published model sizes on 64 to 1,024 devices, by placement.

No weights and no recipe: the configs are written here, with the numbers that Meta published for
Llama 3.1 (The Llama 3 Herd of Models, arXiv 2407.21783, table 3). The plans' own assumptions hold
(devices.py, rings.py), and those of the job are the constants below.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from amid_ds.config.recipe import Recipe
from amid_ds.planning.devices import EFFICIENCY, HEADROOM, Device
from amid_ds.planning.placement import PlacementCosts, choose_placement, costs_of, placement_costs
from amid_ds.planning.report import placement_title
from amid_ds.planning.setting import Placement, Setting, make_setting, with_placement

# The job: 1,024 rows a step, of 8,192 tokens (8.4 million in all) or of 2,048; a row a micro-batch,
# with activation checkpointing, bf16 and ZeRO-3, without tensor parallelism.
SEQ_LENGTHS = (8192, 2048)
GLOBAL_BATCH_SIZE = 1024
DEVICES_PER_NODE = 8
DEVICE_COUNTS = (64, 256, 1024)
PAIRS = (("8B", "70B"), ("8B", "405B"), ("70B", "405B"))


class LlamaNumbers(NamedTuple):
    """Of a Llama 3.1: its width, layers, the MLP's width and heads; 8 of them have keys."""

    hidden_size: int
    layers: int
    intermediate_size: int
    heads: int


LLAMAS = {"8B": LlamaNumbers(4096, 32, 14336, 32), "70B": LlamaNumbers(8192, 80, 28672, 64),
          "405B": LlamaNumbers(16384, 126, 53248, 128)}
LLAMA_KEY_VALUE_HEADS = 8
LLAMA_VOCABULARY = 128256
ASSUMPTIONS = (
    "In a cell: seconds of a step, what binds (seconds of FLOPs · of links inside a node · of "
    "links between nodes), memory of a rank. auto: what placement: auto takes.\n"
    f"Assumed: {GLOBAL_BATCH_SIZE:,} rows a step, a row a micro-batch, activation checkpointing, "
    f"bf16, ZeRO-3 (ds_configs/zero3.json), no tensor parallelism, {DEVICES_PER_NODE} ranks a "
    f"node; products at {EFFICIENCY:.0%} of the peak, links at full speed (a port per device "
    "between nodes), hops of rings as in NCCL's own model; in each model's passes the longest of "
    "FLOPs, links inside and links between counts; "
    f"{HEADROOM:.0%} of the memory may be planned for.")


@dataclass(frozen=True)
class ScaleRow:
    """A placement of one pair on so many ranks; tokens_per_step and tokens_per_day: of all ranks.

    taken: it is the one that `placement: auto` takes.
    """

    student: str
    teacher: str
    ranks: int
    tokens_per_step: int
    costs: PlacementCosts
    tokens_per_day: float
    taken: bool


def paper_scale_rows(device: Device) -> list[ScaleRow]:
    """Every pair on every number of ranks, with each placement."""
    with tempfile.TemporaryDirectory() as name:
        save_llama_configs(Path(name))
        return [row for length in SEQ_LENGTHS for student, teacher in PAIRS
                for ranks in DEVICE_COUNTS
                for row in _rows_of(Path(name), student, teacher, length, ranks, device)]


def save_llama_configs(folder: Path) -> None:
    """Save the config of each Llama in a folder of its name."""
    from transformers import LlamaConfig

    for name, numbers in LLAMAS.items():
        LlamaConfig(
            hidden_size=numbers.hidden_size, num_hidden_layers=numbers.layers,
            intermediate_size=numbers.intermediate_size, num_attention_heads=numbers.heads,
            num_key_value_heads=LLAMA_KEY_VALUE_HEADS, vocab_size=LLAMA_VOCABULARY,
            max_position_embeddings=max(SEQ_LENGTHS), tie_word_embeddings=False, dtype="bfloat16",
            architectures=["LlamaForCausalLM"]).save_pretrained(folder / name)


def _rows_of(folder: Path, student: str, teacher: str, seq_length: int, ranks: int,
             device: Device) -> Iterator[ScaleRow]:
    recipe = Recipe.model_validate({
        "student": {"model": str(folder / student), "activation_checkpointing": True},
        "teacher": {"model": str(folder / teacher)},
        "data": {"train": [{"path": "none"}]}, "output_dir": str(folder), "deepspeed": "zero3.json",
        "train": {"steps": 1, "seq_length": seq_length, "micro_batch_size": 1,
                  "global_batch_size": GLOBAL_BATCH_SIZE}})
    setting = make_setting(recipe, ranks, device, ranks // DEVICES_PER_NODE)
    chosen = choose_placement(setting)
    tokens = GLOBAL_BATCH_SIZE * seq_length
    for costs in _costs(setting):
        own = None if costs.placement != "node" else costs.shard_over
        yield ScaleRow(student, teacher, ranks, tokens, costs, tokens / costs.seconds * 86400,
                       taken=(costs.placement, own) == (chosen.placement, chosen.shard_over))


def _costs(setting: Setting) -> list[PlacementCosts]:
    """Those of every placement, and where a node cannot hold a copy the fewest nodes that can."""
    every = placement_costs(setting)
    more = []
    if not all(costs.fits for costs in every if costs.placement == "node"):
        over = 2 * DEVICES_PER_NODE
        while over < setting.data_parallel:
            costs = costs_of(with_placement(setting, Placement("node", over)))
            if costs.fits:
                more = [costs]
                break
            over *= 2
    return every[:2] + more + every[2:]


def print_paper_scale(device: Device, as_json: bool) -> None:
    """Print the table with its assumptions, or JSON alone."""
    rows = paper_scale_rows(device)
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"| pair | {device.name} | M tokens a step | zero3 | node | node, more ranks a copy | "
          "replicated | auto | G tokens a day |\n|---|---:|---:|---|---|---|---|---|---:|")
    for job in itertools.groupby(rows, lambda row: (row.student, row.teacher, row.ranks,
                                                    row.tokens_per_step)):
        print(_line(list(job[1])))
    print(ASSUMPTIONS)


def _line(rows: Sequence[ScaleRow]) -> str:
    """The table's line of one job, with a cell for each of its placements."""
    first, taken = rows[0], next(row for row in rows if row.taken)
    cells = {name: "" for name in ("zero3", "node", "more", "replicated")}
    for row in rows:
        is_more = row.costs.placement == "node" and row.costs.shard_over > DEVICES_PER_NODE
        cells["more" if is_more else row.costs.placement] = _cell(row.costs)
    return "| " + " | ".join([
        f"{first.student} ← {first.teacher}", f"{first.ranks:,}",
        f"{first.tokens_per_step / 1e6:.1f}", *cells.values(), placement_title(taken.costs),
        f"{taken.tokens_per_day / 1e9:,.1f}"]) + " |"


def _cell(costs: PlacementCosts) -> str:
    memory = f"{costs.memory / 1e9:,.0f} GB"
    if not costs.fits:
        return f"{memory}: does not fit"
    parts = costs.parts
    over = f"over {costs.shard_over}: " if costs.shard_over > DEVICES_PER_NODE and (
        costs.placement == "node") else ""
    return (f"{over}{costs.seconds:.3g} s, {costs.binds.replace('_', ' ')} ({parts.flops:.3g} · "
            f"{parts.links_inside:.2g} · {parts.links_between:.2g}), {memory}")
