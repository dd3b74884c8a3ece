"""Does a run fit, how long does it take and what crosses the network, before anybody waits in a queue for the answer.

Sizes follow from the recipe, the DeepSpeed config and the two models' configs: both bodies run once on torch's meta
device, which has shapes and no numbers, and what autograd would keep and what the products would cost is counted on the
way. Nothing is measured here. What is assumed beside sizes is in EFFICIENCY, HEADROOM and the table of devices; the
time is a rough one, the memory is meant to be held against a run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from amid_ds.config.parse import dump_recipe, parse_recipe, resolved
from amid_ds.config.recipe import Recipe, Student, Teacher, bounding_values
from amid_ds.data import epochs_ahead
from amid_ds.engine import ds_config
from amid_ds.errors import InputError
from amid_ds.losses import default_workspace_bytes
from amid_ds.losses.tiles import tiling
from amid_ds.models import loading
from amid_ds.models.heads import body_of, head_of
from amid_ds.models.tensor_parallel import shrink_to_tp_rank, split_parameters
from amid_ds.monitor.memory_probe import read_measurements
from amid_ds.run.log import read_metrics
from amid_ds.run.warm_start import resolve_student

EFFICIENCY = 0.45      # of a device's dense peak that large matrix products reach in training
HEADROOM = 0.92        # of its memory that may be planned for: the rest goes to fragments, the context and NCCL
ADAM_BYTES = 8         # two moments in fp32
RECENT = 20            # logged steps of a run whose median time a plan is held against


@dataclass(frozen=True)
class Device:
    """One rank's device: bytes of memory, dense bf16 FLOP/s, bytes/s that it takes in from other nodes and its own."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    neighbours: float


DEVICES = {device.name: device for device in (      # by the makers' data sheets; one 400 or 200 Gb/s port per device
    Device("h100-80g", 80e9, 989e12, 50e9, 450e9), Device("h200", 141e9, 989e12, 50e9, 450e9),
    Device("a100-80g", 80e9, 312e12, 25e9, 300e9))}
DEFAULT_DEVICE = "h100-80g"


@dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs and seconds of one rank; `tokens_per_step` is of all."""

    device: Device
    ranks: int
    tokens_per_step: int
    micro_batches: int
    steps: int
    memory_per_rank: dict[str, int]
    network_per_step: dict[str, int]      # bytes that the rank takes in
    flops_per_step: dict[str, float]
    seconds_per_step: float
    checkpoint_bytes: int                 # of all ranks together
    activations: dict[str, int]           # bytes of a rank, `without_checkpointing` and `with_checkpointing`
    fits: bool
    epochs: list[float] | None = None     # of each source by the last step; None: it takes reading the data to know
    remedies: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    @property
    def mfu(self) -> float:
        """FLOPs that the models need over those that the device could have done meanwhile."""
        return sum(self.flops_per_step.values()) / (self.seconds_per_step * self.device.flops)


def find_device(name: str, ranks_per_node: int) -> Device:
    """A known name, `cpu` for this machine's, or a mapping {memory: …, flops: …, bandwidth: …} of numbers above 0.

    Raises InputError for any other, and for less than one rank.
    """
    _require_ranks(1, ranks_per_node)
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        cores = psutil.cpu_count() or 1
        return Device("cpu", psutil.virtual_memory().total / ranks_per_node, 1e11 * cores / ranks_per_node, 2e9, 2e9)
    try:
        numbers = {key: float(value) for key, value in yaml.safe_load(name).items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, OverflowError):
        numbers = {}
    if numbers.keys() != {"memory", "flops", "bandwidth"} or not all(0 < number < math.inf
                                                                     for number in numbers.values()):
        raise InputError(f"the device {name!r}", f"one of {', '.join(DEVICES)}, cpu, or "
                         "{memory: BYTES, flops: FLOP/s, bandwidth: BYTES/s}, each finite and above 0",
                         "name a device, or give its numbers")
    return Device("given", **numbers, neighbours=numbers["bandwidth"])


def _require_ranks(nodes: int, ranks_per_node: int) -> None:
    if nodes < 1 or ranks_per_node < 1:
        raise InputError(f"{nodes} node(s) of {ranks_per_node} rank(s)", "at least one of each", "raise the number")


def make_plan(recipe: Recipe, nodes: int, ranks_per_node: int, device: Device) -> Plan:
    """What `recipe` takes on nodes x ranks_per_node ranks. Raises InputError for a layout that cannot be,
    and for a model that does not run on torch's meta device."""
    _require_ranks(nodes, ranks_per_node)
    plan = _plan(recipe, nodes, nodes * ranks_per_node, device)
    train = recipe.train
    epochs = epochs_ahead(recipe.data, train.seq_length, recipe.prepared_dir, train.steps * train.global_batch_size)
    return replace(plan, epochs=epochs, remedies=[] if plan.fits else list(_remedies(recipe, nodes, plan)))


def device_here(ranks_here: int) -> Device | None:
    """The device of this process, one of `ranks_here` on its node; None for a GPU that is not in the table."""
    return device_called(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", ranks_here)


def device_called(name: str, ranks_here: int) -> Device | None:
    """The device that torch calls `name`; None where it is not in the table."""
    if name == "cpu":
        return find_device("cpu", ranks_here)
    return next((device for device in DEVICES.values() if device.name.split("-")[0] in name.lower()), None)


def costs_of(recipe: Recipe, ranks: int, device: Device | None) -> tuple[dict[str, float], float | None]:
    """A rank's planned FLOPs per step of `student` and `teacher`, and what its device could do in a second."""
    assumed = device or find_device("cpu", 1)      # FLOPs are the same on any
    return _plan(recipe, 1, ranks, assumed).flops_per_step, device.flops if device is not None else None


@dataclass(frozen=True)
class _Sizes:
    """One model on one rank. Elements, unless named otherwise."""

    whole: int               # of the model
    held: int                # what a tensor-parallel rank has of it before ZeRO
    shard: int               # what ZeRO-3 leaves with a rank
    largest_layer: int       # of what one gather puts together
    head: int
    width: int
    saved_bytes: int         # kept for backward by the body, for one micro-batch
    layer_bytes: int         # of which one layer's
    layers: int
    flops: float             # of the body's forward, for one micro-batch, on this rank
    item: int                # bytes of an element
    common: int              # of `held`: what a tensor-parallel group shares, which ZeRO-3 partitions over all ranks
    inner: int               # width between an MLP's layers
    embedding: int
    tied: bool               # the head is the embedding
    summed: tuple[int, int]  # width of what AutoTP sums for a token, in forward and in backward


def _plan(recipe: Recipe, nodes: int, ranks: int, device: Device) -> Plan:
    dp = ds_config.data_parallel_size(recipe, ranks)
    config = ds_config.read_deepspeed_config(recipe, dp)
    accumulation = config["gradient_accumulation_steps"]
    train, tp = recipe.train, recipe.tensor_parallel
    tokens = train.micro_batch_size * train.seq_length
    bf16 = bool(config.get("bf16", {}).get("enabled"))
    student = _sizes(resolve_student(recipe), torch.bfloat16 if bf16 else torch.float32, recipe, dp)
    teacher = None
    if recipe.teacher is not None and any(bounding_values(recipe.loss.kd_weight)):
        named = loading.DTYPES.get(recipe.teacher.dtype)
        teacher = _sizes(recipe.teacher, named or loading.checkpoint_dtype(
            recipe.teacher.model, **recipe.teacher.hub_kwargs), recipe, dp)
    memory = _states(recipe, config, student, teacher, dp)
    taught = ds_config.accumulation_steps(recipe, dp)      # an auxiliary corpus has as many micro-batches, and no teacher
    memory |= _working(recipe, config, student, teacher, tokens, taught, ranks, device, sum(memory.values()))
    memory["total"] = sum(memory.values())
    network = _network(recipe, config, student, teacher, dp, tokens, accumulation)
    head = 2 * tokens / tp
    flops = {"student": 3 * accumulation * (student.flops + head * student.head),
             "teacher": 0.0 if teacher is None else taught * (teacher.flops + head * teacher.head)}
    again = student.flops * accumulation if recipe.student.activation_checkpointing else 0.0      # no part of MFU
    within = network.get("tensor_parallel", 0)      # neighbours, which share a node
    between = sum(network.values()) - within
    seconds = max((sum(flops.values()) + again) / (device.flops * EFFICIENCY),
                  within / device.neighbours + between / (device.bandwidth if nodes > 1 else device.neighbours))
    activations = {"without_checkpointing": student.saved_bytes,
                   "with_checkpointing": sum(_checkpointed(student, tokens))}
    return Plan(device, ranks, train.global_batch_size * train.seq_length, accumulation, train.steps, memory, network,
                flops, seconds, student.whole * (4 + ADAM_BYTES + (student.item if bf16 else 0)),
                activations, memory["total"] <= HEADROOM * device.memory)


def _states(recipe: Recipe, config: dict[str, Any], student: _Sizes, teacher: _Sizes | None, dp: int) -> dict[str, int]:
    """What lies there from the first step to the last."""
    zero = config.get("zero_optimization", {})
    stage = ds_config.zero_stage(config)
    host = {what: zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("param", "optimizer")}
    own = student.shard if stage == 3 else -(-student.held // dp) if stage else student.held
    # Stage 1 adds the micro-batches' gradients up before it reduces them.
    once = stage == 1 and config["gradient_accumulation_steps"] == 1
    masters = 4 if stage or student.item == 2 else 0      # without ZeRO, fp32 weights are their own
    parts = {"student_weights": 0 if host["param"] else (student.shard if stage == 3 else student.held) * student.item,
             "gradients": 0 if host["optimizer"] else (own if stage >= 2 or once else student.held) * student.item,
             "optimizer": 0 if host["optimizer"] else own * (masters + ADAM_BYTES)}
    if teacher is not None:
        alone = stage != 3 or ds_config.teacher_is_replicated(recipe, config)
        parts["teacher_weights"] = teacher.held * teacher.item if alone else \
            0 if host["param"] else teacher.shard * teacher.item
    return parts


def _checkpointed(student: _Sizes, tokens: int) -> tuple[int, int]:
    """Bytes of the activations that are kept, the layers' inputs, and of one layer's, which is made again at a time."""
    outside = student.saved_bytes - student.layers * student.layer_bytes
    return outside + student.layers * tokens * student.width * student.item, student.layer_bytes


def _working(recipe: Recipe, config: dict[str, Any], student: _Sizes, teacher: _Sizes | None, tokens: int,
             accumulation: int, ranks: int, device: Device, states: int) -> dict[str, int]:
    """What a step needs beside. The teacher's pass and the student's are not at the same time: the larger counts."""
    zero = config.get("zero_optimization", {})
    stage = ds_config.zero_stage(config)
    bucket = int(zero.get("reduce_bucket_size", 5e8)) if stage else 0
    if not zero.get("contiguous_gradients", True):      # else DeepSpeed allocates it whole, whatever the model
        bucket = min(bucket, student.held)
    elif stage in (1, 2) and zero.get("overlap_comm"):
        bucket *= 2
    live = int(zero.get("stage3_max_live_parameters", 1e9))
    saved, again = _checkpointed(student, tokens) if recipe.student.activation_checkpointing else \
        (student.saved_bytes, 0)
    kind = torch.device("cpu" if device.name == "cpu" else "cuda")
    logits = tokens * student.head // student.width * (student.item + (teacher.item if teacher is not None else 0))
    workspace = min(default_workspace_bytes(kind), logits + tiling(kind)[0])

    def spread(model: _Sizes) -> int:
        """Elements of which other ranks hold a part. What a rank has whole is not copied."""
        return model.held if ranks > recipe.tensor_parallel else model.common

    gathered = min(spread(student), live + student.largest_layer) * student.item if stage == 3 else 0
    parts = {
        "activations": saved,
        "recomputed_layer": again,
        "gathered": gathered,
        "gather_buffers": gathered,      # what arrives lies in a buffer first
        "reduce_bucket": bucket * (4 if stage == 1 else student.item),
        # the gradients of the head and of the hidden states are summed in fp32, then given in the weights' dtype
        "loss_workspace": workspace + (student.head + tokens * student.width) * (4 + (2 if student.item == 2 else 0))}
    if teacher is None:
        return parts
    window = tokens * accumulation
    parts["teacher_hidden"] = window * teacher.width * teacher.item
    allowed = (8 * teacher.width + 4 * teacher.inner) * teacher.item      # a token's, as engine.plan_teaching has it
    per_pass = recipe.teacher.max_tokens_per_pass if recipe.teacher else None
    per_pass = per_pass or max(tokens, min(window, int((device.memory - states) / 8 / allowed)))
    # Nothing is kept for backward: the residual stream and its norm, and what an MLP with a gate has at once.
    of_teacher = min(per_pass, window) * (2 * teacher.width + 3 * teacher.inner) * teacher.item
    of_student = saved + again + gathered + parts["gather_buffers"] + parts["loss_workspace"]
    if stage == 3 and not ds_config.teacher_is_replicated(recipe, config):
        # Each module that runs prefetches a bucket more, up to what may live: all of the teacher, then the student.
        body = teacher.held - (0 if teacher.tied else teacher.head)
        whole = min(body, spread(teacher), live + teacher.largest_layer)
        of_teacher += 2 * whole * teacher.item + min(spread(student), max(0, live - whole)) * student.item
        parts["teacher_head"] = min(teacher.head, spread(teacher)) * teacher.item
        of_student += parts["teacher_head"]
    parts["teacher_pass"] = max(0, of_teacher - of_student)
    return parts


def _network(recipe: Recipe, config: dict[str, Any], student: _Sizes, teacher: _Sizes | None, dp: int, tokens: int,
             accumulation: int) -> dict[str, int]:
    """Bytes that one rank takes in for a step."""
    zero, stage = config.get("zero_optimization", {}), ds_config.zero_stage(config)
    tp = recipe.tensor_parallel

    def from_others(model: _Sizes, elements: int) -> float:
        """The bytes among `elements` of its weights that lie on other ranks. Stage 3 spreads common ones over all."""
        common = min(model.common, elements) if stage == 3 else 0
        return model.item * ((elements - common) * (1 - 1 / dp) + common * (1 - 1 / (dp * tp)))

    reuse = int(zero.get("stage3_max_reuse_distance", 1e9))
    # A trace spans the window, so weights within the distance of their next use stay gathered from pass to pass.
    passes = (1 if student.held <= reuse else 2 * accumulation) if stage == 3 else 1 if stage else 0
    # Stage 3 scatters the sums of each micro-batch, stage 2 gives them to all, stages 0 and 1 do so once for the step.
    reductions = {3: accumulation, 2: 2 * accumulation}.get(stage, 2)
    # The embedding is let go of after a micro-batch's backward, where it comes last, and the next one begins with it.
    anew = (accumulation - 1) * from_others(student, student.embedding) if stage == 3 and passes == 1 else 0
    parts = {"student_gathers": int(passes * from_others(student, student.held) + anew),
             "student_reductions": int(reductions * from_others(student, student.held))}
    if teacher is not None:
        sharded = stage == 3 and not ds_config.teacher_is_replicated(recipe, config)
        again = from_others(teacher, teacher.embedding) if teacher.tied else 0      # for the body, then for the loss
        parts["teacher_gathers"] = int(from_others(teacher, teacher.held) + again) if sharded else 0
    if tp > 1:
        forward, backward = student.summed
        forwards = 2 if recipe.student.activation_checkpointing else 1
        width = (forwards * forward + backward) * student.item + student.width * 4      # the hidden states' gradient
        width += teacher.summed[0] * teacher.item if teacher is not None else 0
        parts["tensor_parallel"] = int(accumulation * tokens * width * 2 * (1 - 1 / tp))
    return parts


def _remedies(recipe: Recipe, nodes: int, plan: Plan) -> Iterator[str]:
    """The smallest changes with which it would fit, each with its price."""
    train = recipe.train
    changes: list[tuple[str, dict[str, Any]]] = []
    half = train.micro_batch_size
    while half > 1 and half % 2 == 0:
        half //= 2
        smaller = train.model_copy(update={"micro_batch_size": half})
        changes.append((f"train.micro_batch_size={half}", {"train": smaller}))
    checkpointed = recipe.student.model_copy(update={"activation_checkpointing": True})
    changes.append(("student.activation_checkpointing=true", {"student": checkpointed}))
    changes += [(f"tensor_parallel={size}", {"tensor_parallel": size}) for size in (2, 4, 8)
                if size > recipe.tensor_parallel]
    changes.append(("deepspeed=ds_configs/zero3_offload.json", {"deepspeed": "ds_configs/zero3_offload.json"}))
    pairs = [(f"{a} {b}", {**x, **y}) for i, (a, x) in enumerate(changes) for b, y in changes[i + 1:]
             if not x.keys() & y.keys()]
    for group in (changes, pairs):
        found = False
        for text, update in group:
            try:
                other = _plan(recipe.model_copy(update=update), nodes, plan.ranks, plan.device)
            except InputError:
                continue      # a layout that these ranks or this batch cannot have
            if other.fits:
                found = True
                yield (f"{text}: {other.memory_per_rank['total'] / 1e9:.1f} GB, "
                       f"{other.seconds_per_step / plan.seconds_per_step:.2f} x the time of a step")
        if found:
            return


def _sizes(model: Student | Teacher, dtype: torch.dtype, recipe: Recipe, dp: int) -> _Sizes:
    shell: Any = loading.meta_model(model.model, **model.hub_kwargs).to(dtype)
    tp = recipe.tensor_parallel
    split = split_parameters(shell, tp)
    apart = isinstance(model, Teacher) and model.placement == "replicated"
    held = shard = whole = common = 0
    for name, parameter in shell.named_parameters():
        size = parameter.numel()
        part = -(-size // tp) if name in split and not apart else size
        whole, held = whole + size, held + part
        # A tensor-parallel group's common parameters are partitioned over all ranks, the others over the data-parallel.
        shared = part == size and tp > 1
        shard += -(-size // (dp * tp)) if shared else -(-part // dp)
        common += size if shared else 0
    head, embedding = head_of(shell).weight, shell.get_input_embeddings().weight
    summed = (0, 0) if apart else shrink_to_tp_rank(shell, tp)
    layers = next((module for module in body_of(shell).modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())
    per_layer = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
    inner = getattr(shell.config, "intermediate_size", None) or 4 * head.shape[1]
    rows, length = recipe.train.micro_batch_size, recipe.train.seq_length
    try:
        saved, flops = _run_on_meta(shell, rows, length)
        one = _run_on_meta(shell, rows, length, layers=len(layers) - 1)[0] if len(layers) > 1 else 0
    except (RuntimeError, TypeError) as error:      # NotImplementedError is a RuntimeError
        why = str(error).partition("\n")[0]
        raise InputError(f"{model.model} does not run on torch's meta device, so there is no plan: {why}",
                         "a model whose shapes do not depend on numbers", "train it without a plan") from None
    return _Sizes(whole, held, shard, max(per_layer, head.numel() // tp), head.numel() // tp, head.shape[1], saved,
                  max(0, saved - one), len(layers), flops, torch.empty(0, dtype=dtype).element_size(), common,
                  inner, embedding.numel(), head is embedding, summed)


class _Attention(torch.autograd.Function):
    """What a fused attention keeps for backward: its three inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError


def _run_on_meta(shell: Any, rows: int, length: int, layers: int | None = None) -> tuple[int, float]:
    """(bytes kept for backward, FLOPs of the forward) of the body, or its first `layers`, for [rows, length] tokens."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    attended = 0.0

    def attention(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        nonlocal attended
        attended += 2 * query.numel() * key.shape[2]      # two products, half of each masked
        return _Attention.apply(query, key, value), None

    AttentionInterface.register("planned", attention)
    AttentionMaskInterface.register("planned", lambda *_, **__: None)
    kept: dict[int, int] = {}
    owned = {parameter.untyped_storage()._cdata for parameter in shell.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    body: Any = body_of(shell)
    stack = next((name for name, module in body.named_children() if isinstance(module, nn.ModuleList)), None)
    every: Any = getattr(body, stack) if stack else None
    before = shell.config._attn_implementation
    shell.config._attn_implementation = "planned"
    if stack and layers is not None:
        setattr(body, stack, every[:layers])
    try:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        del states
        return sum(kept.values()), float(counter.get_total_flops()) + attended
    finally:
        shell.config._attn_implementation = before
        if stack:
            setattr(body, stack, every)


def fit_in_words(recipe: Recipe, nodes: int, ranks_per_node: int, device: Device) -> str:
    """One line: whether `recipe` fits, and what it takes."""
    plan = _plan(recipe, nodes, nodes * ranks_per_node, device)
    return (f"{'fits' if plan.fits else 'does not fit'} on {nodes * ranks_per_node} x {device.name} (--device): "
            f"{plan.memory_per_rank['total'] / 1e9:,.1f} of {device.memory / 1e9:,.0f} GB a rank, about "
            f"{plan.seconds_per_step:,.2f} s a step, {plan.hours:,.1f} h"
            + ("" if plan.fits else "; amid-ds plan names the changes with which it would"))


def plan_again(found: dict[str, Any], device: str | None = None) -> Plan:
    """The plan, without remedies, of the run that left `found` (see read_measured), on its own ranks and device; on
    `device` where one is given. Raises InputError where that is not in the table, or its models are elsewhere by now.
    """
    hosts, nodes = found["hosts"], len(set(found["hosts"]))
    known = find_device(device, len(hosts) // nodes) if device else device_called(found["device"], len(hosts) // nodes)
    if known is None:
        raise InputError(f"the run was on {found['device']}", f"one of {', '.join(DEVICES)}, or cpu",
                         "give its numbers by --device '{memory: …, flops: …, bandwidth: …}'")
    return _plan(parse_recipe(found["recipe"], "the recipe of the run that was measured"), nodes, len(hosts), known)


def check_plan(run: Path, device: str | None) -> dict[str, dict[str, dict[str, float | None]]]:
    """What was planned and what was measured in the run's folder, by part: bytes and seconds; None for what was not.

    `device` as `find_device` takes it; None: the one that the run was on. Raises InputError where nothing was measured.
    """
    found = read_measurements(run)
    plan = plan_again(found, device)
    times = [line["time/step"] for line in read_metrics(run) if line["step"] >= found["step"] and "time/step" in line]
    if not times:
        raise InputError(f"{run} has no metrics", "metrics.jsonl with the steps that were measured", "check the folder")
    planned: dict[str, Any] = {"memory_per_rank": plan.memory_per_rank, "network_per_step": plan.network_per_step,
                               "seconds": {"step": plan.seconds_per_step}}
    measured = {**found, "seconds": {"step": statistics.median(times[-RECENT:])}}
    return {what: {part: {"planned": planned[what].get(part), "measured": measured[what].get(part)}
                   for part in {**planned[what], **measured[what]}} for what in planned}


def print_check(checked: dict[str, dict[str, dict[str, float | None]]], as_json: bool) -> None:
    """The prediction beside the measurement as a table, or as JSON alone."""
    if as_json:
        print(json.dumps(checked))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("", "planned", "measured", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, parts in checked.items():
        unit = 1 if what == "seconds" else 1e6
        for part, pair in parts.items():
            planned, measured = pair["planned"], pair["measured"]
            shown = ["–" if size is None else f"{size / unit:,.3f}" for size in (planned, measured)]
            off = f"{planned / measured - 1:+.1%}" if planned and measured else "–"
            table.add_row(f"{part.replace('_', ' ')}, {'s' if unit == 1 else 'MB'}", *shown, off)
        table.add_section()
    Console().print(table)


def _epochs_in_words(plan: Plan, recipe: Recipe) -> str:
    if plan.epochs is not None:
        return ", ".join(f"{source.path} {count:.3g}"
                         for source, count in zip(recipe.data.train, plan.epochs, strict=True))
    return "not known, the sources are streamed" if recipe.data.streams else \
        "not known before the data are prepared, by amid-ds prepare or train"


def print_plan(plan: Plan, recipe: Recipe, as_json: bool) -> None:
    """The resolved recipe and its plan as a table, or as JSON alone."""
    if as_json:
        print(json.dumps({"recipe": resolved(recipe), **asdict(plan), "hours": plan.hours, "mfu": plan.mfu}))
        return
    print(dump_recipe(recipe))
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.ranks} rank(s) of {plan.device.name}, {plan.device.memory / 1e9:.0f} GB each")
    for heading in ("of one rank", "GB"):
        table.add_column(heading, justify="left" if heading == "of one rank" else "right")
    for name, size in plan.memory_per_rank.items():
        table.add_row(name.replace("_", " "), f"{size / 1e9:,.2f}")
    table.add_section()
    for name, size in plan.network_per_step.items():
        table.add_row(f"taken in per step: {name.replace('_', ' ')}", f"{size / 1e9:,.2f}")
    console = Console()
    console.print(table)
    flops = {name: count / 1e12 for name, count in plan.flops_per_step.items()}
    console.print(f"{plan.tokens_per_step:,} tokens a step in {plan.micro_batches} micro-batch(es) per rank, "
                  f"{plan.steps:,} steps; per rank and step {flops['student']:,.1f} TFLOP of the student and "
                  f"{flops['teacher']:,.1f} of the teacher")
    console.print(f"epochs by the last step: {_epochs_in_words(plan, recipe)}", markup=False)
    every, some = (plan.activations[f"{how}_checkpointing"] / 1e9 for how in ("without", "with"))
    console.print(f"activations: {every:,.2f} GB without checkpointing; {some:,.2f} GB with it, a layer made "
                  "again included")
    console.print(f"about {plan.seconds_per_step:,.2f} s a step ({plan.mfu:.0%} MFU; assumed: {EFFICIENCY:.0%} of the "
                  f"peak in products, network and arithmetic overlapped), {plan.hours:,.1f} h, "
                  f"{plan.hours * plan.ranks:,.0f} rank-hours; a checkpoint of {plan.checkpoint_bytes / 1e9:,.1f} GB")
    if plan.fits:
        console.print(f"fits: {plan.memory_per_rank['total'] / 1e9:,.1f} of {plan.device.memory / 1e9:,.0f} GB")
        return
    console.print(f"does not fit: {plan.memory_per_rank['total'] / 1e9:,.1f} GB, and {HEADROOM:.0%} of "
                  f"{plan.device.memory / 1e9:,.0f} GB may be planned for")
    for remedy in plan.remedies or ["none of the usual changes makes it fit: more ranks, or a larger device"]:
        console.print(f"  - {remedy}")
