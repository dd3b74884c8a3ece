"""What a rank really holds and takes in, measured in one step of every life, to be held against the plan.

Rank 0 looks at the fourth step of a life, when ZeRO-3 knows its order of gathers, and leaves `measured.json` in the
run's folder. Tensors that stay are counted where DeepSpeed keeps them, activations as what autograd
keeps of the student's body, bytes on the network at the collectives themselves. The step is a little slower for it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from amid_ds.config.parse import dump_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.files import replace_text

PROBED_STEP = 4             # of a life
MEASURED_FILE = "measured.json"
MEASURED_KEYS = {"step": int, "hosts": list, "device": str, "recipe": str, "memory_per_rank": dict, "network_per_step": dict}
# What a rank of n takes in for each byte of a collective's first tensors: those that a gather fills, a part of those
# that are scattered, those that all end up with, by way of a ring.
RECEIVED_SHARE: dict[str, Callable[[int], float]] = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    **dict.fromkeys(("allgather", "all_gather_single", "_allgather_base"), lambda n: (n - 1) / n),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base"), lambda n: n - 1)}


@contextlib.contextmanager
def probe_step(ds: Any, recipe: Recipe, world: World, hosts: Sequence[str], step: int) -> Iterator[None]:
    """Within it optimizer step `step` is made and measured, and then written down. For rank 0 alone; `hosts`: each
    rank's."""
    probe = _Probe(ds)
    traffic = _Traffic(world)
    gathered = ds.gathered.teacher if hasattr(ds, "gathered") else 0
    with probe, traffic:
        yield
    teacher = (ds.gathered.teacher - gathered) * (1 - 1 / world.dp_size) if hasattr(ds, "gathered") else 0
    network = {"student_gathers": traffic.bytes["gathers"] - int(teacher),
               "student_reductions": traffic.bytes["reductions"], "teacher_gathers": int(teacher)}
    if world.tp_size > 1:
        network["tensor_parallel"] = traffic.bytes["tensor_parallel"]
    facts: dict[str, Any] = {
        "step": step, "hosts": list(hosts),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "recipe": dump_recipe(recipe), "memory_per_rank": {**resident_bytes(ds), **probe.bytes},
        "network_per_step": network}
    if world.device.type == "cuda":
        facts["memory_per_rank"]["total"] = torch.cuda.max_memory_allocated()
    try:
        replace_text(Path(recipe.output_dir) / MEASURED_FILE, json.dumps(facts, indent=1) + "\n")
    except OSError as error:      # a full disk does not stop a run
        print(f"amid-ds: WARNING: what step {step} took cannot be written: {error}", file=sys.stderr, flush=True)


def read_measurements(run: Path) -> dict[str, Any]:
    """Raises InputError where the run has left none, or it is damaged."""
    expected = f"the folder of a run with a life of {PROBED_STEP} steps or more"
    try:
        found = json.loads((run / MEASURED_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{run} has no {MEASURED_FILE}", expected, "give the output_dir of such a run") from None
    except ValueError:
        found = None
    if not _is_whole(found):
        raise InputError(f"{run / MEASURED_FILE} is damaged", f"what a run writes in step {PROBED_STEP} of a life",
                         "remove it: the run's next life measures again")
    return dict(found)


def _is_whole(found: Any) -> bool:
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in MEASURED_KEYS.items()):
        return False
    sizes = [*found["memory_per_rank"].values(), *found["network_per_step"].values()]
    return len(found["hosts"]) > 0 and all(isinstance(size, int) for size in sizes)


def resident_bytes(ds: Any) -> dict[str, int]:
    """Bytes of what lies on this rank from step to step."""
    distiller = ds.module
    models = {"student": distiller.student, "teacher": distiller.teacher}
    parts = {f"{who}_weights": _bytes(getattr(p, "ds_tensor", p) for p in model.parameters())
             for who, model in models.items() if model is not None}
    outer = ds.optimizer
    inner = getattr(outer, "optimizer", outer)
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    masters: list[Tensor] = next((getattr(outer, name) for name in names if hasattr(outer, name)), [])
    moments = [value for state in inner.state.values() for name, value in state.items() if name != "step"]
    return {**parts, "optimizer": _bytes([*masters, *moments])}


def gradient_bytes(ds: Any) -> int:
    """Bytes of the gradients that wait for the optimizer."""
    partitions = getattr(ds.optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", None)
    if partitions is not None:
        return _bytes(partitions.values())
    averaged = getattr(ds.optimizer, "averaged_gradients", {})
    flat = [part for group in averaged.values() if group is not None for part in group]
    flat += list(getattr(ds.optimizer, "fp32_groups_gradients_flat", []))
    return _bytes([*flat, *(p.grad for p in ds.module.parameters() if p.grad is not None)])


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the tensors, what several of them share counted once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.numel():
            seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())


class _Probe:
    """Looks at what autograd keeps while the student's body runs, and at the gradients before they are used."""

    def __init__(self, ds: Any) -> None:
        self.ds = ds
        self.bytes: Counter[str] = Counter()
        self.hooks: list[Any] = []
        self.kept: dict[int, int] = {}      # bytes by storage, of the micro-batch under way
        self.keeping = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.in_body = False

    def __enter__(self) -> _Probe:
        from transformers.modeling_layers import GradientCheckpointingLayer

        distiller, step = self.ds.module, self.ds.step

        def begins(_: Any, inputs: tuple[Any, ...]) -> None:
            self.bytes["teacher_hidden"] += inputs[3].nbytes if inputs[3] is not None else 0
            self._see("gradients", gradient_bytes(self.ds))
            self.kept, self.in_body = {}, True
            self.keeping.__enter__()

        def layer_begins(_: Any, inputs: tuple[Any, ...]) -> None:      # checkpointing keeps it where autograd does not
            if self.in_body and inputs:
                self._keep(inputs[0])

        def body_ends(*_: Any) -> None:
            self.keeping.__exit__()
            self.in_body = False
            self._see("activations", sum(self.kept.values()))
            self._see("gathered", sum(p.data.nbytes for p in distiller.student.parameters() if hasattr(p, "ds_tensor")
                                      and p.data_ptr() != p.ds_tensor.data_ptr()))      # whole on this rank as it is

        def steps(*arguments: Any, **options: Any) -> Any:
            self._see("gradients", gradient_bytes(self.ds))
            return step(*arguments, **options)

        layers = [module for module in distiller.student.modules() if isinstance(module, GradientCheckpointingLayer)
                  and module.gradient_checkpointing]
        self.hooks = [distiller.register_forward_pre_hook(begins), distiller.head.register_forward_pre_hook(body_ends),
                      *(layer.register_forward_pre_hook(layer_begins) for layer in layers)]
        self.ds.step = steps
        return self

    def __exit__(self, *_: object) -> None:
        del self.ds.step
        for hook in self.hooks:
            hook.remove()

    def _see(self, part: str, size: int) -> None:
        self.bytes[part] = max(self.bytes[part], size)

    def _keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        weights = (p.data.untyped_storage().data_ptr() for p in self.ds.module.student.parameters())
        if place not in self.kept and place not in weights:
            self.kept[place] = tensor.untyped_storage().nbytes()
        return tensor


class _Traffic:
    """Bytes that this rank takes in through torch's collectives, by what they are for.

    Counted where torch hands a collective to its group: in a dispatch mode, which would see them too, nothing compiles.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.bytes: Counter[str] = Counter()
        first = world.rank - world.tp_rank
        self.neighbours = list(range(first, first + world.tp_size))
        self.handed = {name: vars(ProcessGroup)[name] for name in RECEIVED_SHARE if name in vars(ProcessGroup)}

    def __enter__(self) -> _Traffic:
        for name in self.handed:      # some are called otherwise in other versions of torch
            setattr(ProcessGroup, name, self._counting(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, method in self.handed.items():
            setattr(ProcessGroup, name, method)

    def _counting(self, name: str) -> Any:
        def call(group: ProcessGroup, tensors: Any, *rest: Any, **options: Any) -> Any:
            self._count(name, group, sum(tensor.nbytes for tensor in _tensors(tensors)))
            return self.handed[name].__get__(group)(tensors, *rest, **options)
        return call

    def _count(self, name: str, group: ProcessGroup, size: int) -> None:
        ranks = get_process_group_ranks(group)
        what = "gathers" if "gather" in name else "reductions"
        if self.world.tp_size > 1 and ranks == self.neighbours and name == "allreduce":
            what = "tensor_parallel"
        self.bytes[what] += int(size * RECEIVED_SHARE[name](len(ranks)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []
