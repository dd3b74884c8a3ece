"""Memory that a rank holds and bytes that it receives, measured in one step of every attempt.

Rank 0 looks at the fourth step of an attempt, when ZeRO-3 knows its order of gathers, and writes
`measured.json` into the run's folder, to be compared with the plan. Resident tensors are counted
where DeepSpeed keeps them, activations as what autograd keeps of the student's body, bytes on the
network at the collectives themselves. The step is a little slower for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from amid_ds.config.parse import dump_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.files.atomic import replace_text
from amid_ds.run.folder import RunFolder

if TYPE_CHECKING:
    from amid_ds.engine.engine import Engine

# The step of an attempt that is measured, counted from 1.
PROBED_STEP = 4
# Bytes that a rank of n receives for each byte of a collective's first tensors: those that a gather
# or an exchange fills, one rank's part of those that are scattered, those that a ring's all-reduce
# sums.
RECEIVED_SHARE: Mapping[str, Callable[[int], float]] = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    **dict.fromkeys(("allgather", "all_gather_single", "_allgather_base",
                     "alltoall_base", "all_to_all_single"), lambda n: (n - 1) / n),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base"),
                    lambda n: n - 1)}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurements:
    """The content of `measured.json`.

    step: the one that was measured; hosts: each rank's; device: rank 0's; recipe: as YAML;
    memory_per_rank and network_per_step: rank 0's bytes by part.
    """

    step: int
    hosts: list[str]
    device: str
    recipe: str
    memory_per_rank: dict[str, int]
    network_per_step: dict[str, int]


@contextlib.contextmanager
def probe_step(engine: Engine, recipe: Recipe, step: int) -> Iterator[None]:
    """A context that measures optimizer step `step`, made in it, and writes measured.json.

    For rank 0 alone.
    """
    world = engine.world
    probe, traffic = _MemoryProbe(engine), _Traffic(world)
    received_before = engine.gathered_bytes.teacher_received
    with probe, traffic:
        yield
    teacher = int(engine.gathered_bytes.teacher_received - received_before)
    network = {"student_gathers": traffic.bytes["gathers"] - teacher,
               "student_reductions": traffic.bytes["reductions"], "teacher_gathers": teacher}
    if world.tp_size > 1:
        network["tensor_parallel"] = traffic.bytes["tensor_parallel"]
    if world.experts is not None:
        network["expert_exchange"] = traffic.bytes["expert_exchange"]
    memory, device = {**engine.resident_bytes(), **probe.bytes}, "cpu"
    if world.device.type == "cuda":
        memory["total"], device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    hosts = [world.hosts[rank] for rank in range(world.size)]
    measured = Measurements(step, hosts, device, dump_recipe(recipe), memory, network)
    # A full disk does not end a run.
    try:
        path = RunFolder(Path(recipe.output_dir)).measurements
        replace_text(path, json.dumps(asdict(measured), indent=1) + "\n")
    except OSError as error:
        logger.warning("the measurements of step %d cannot be written: %s", step, error)


def read_measurements(run: Path) -> Measurements:
    """The measurements in a run's folder. Raises InputError if there are none, or damaged ones."""
    path = RunFolder(run).measurements
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{run} has no {path.name}",
                         f"the folder of a run with an attempt of {PROBED_STEP} steps or more",
                         "give the output_dir of such a run") from None
    except (ValueError, RecursionError):
        values = None
    if not _is_complete(values):
        raise InputError(f"{path} is damaged",
                         f"what a run writes in step {PROBED_STEP} of an attempt",
                         "remove it: the run's next attempt measures again")
    return Measurements(**{name: values[name] for name in Measurements.__dataclass_fields__})


def _is_complete(values: object) -> bool:
    kinds = {"step": int, "hosts": list, "device": str, "recipe": str, "memory_per_rank": dict,
             "network_per_step": dict}
    if not isinstance(values, dict):
        return False
    if not all(isinstance(values.get(key), kind) for key, kind in kinds.items()):
        return False
    sizes = [*values["memory_per_rank"].values(), *values["network_per_step"].values()]
    return (len(values["hosts"]) > 0 and all(isinstance(host, str) for host in values["hosts"])
            and all(isinstance(size, int) for size in sizes))


class _MemoryProbe:
    """Measures activations while the student's body runs, and gradients before they are used.

    Activations are what autograd keeps.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.student: nn.Module = engine.distiller.student
        self.bytes: Counter[str] = Counter()
        self.hooks: list[Any] = []
        # Bytes by storage, of the micro-batch under way.
        self.kept: dict[int, int] = {}
        self.keeping = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.in_body = False

    def __enter__(self) -> _MemoryProbe:
        from transformers.modeling_layers import GradientCheckpointingLayer

        distiller = self.engine.distiller
        checkpointed = [module for module in self.student.modules()
                        if isinstance(module, GradientCheckpointingLayer)
                        and module.gradient_checkpointing]
        self.hooks = [distiller.register_forward_pre_hook(self._begin_micro_batch,
                                                          with_kwargs=True),
                      distiller.head.register_forward_pre_hook(self._end_body),
                      *(layer.register_forward_pre_hook(self._begin_checkpointed_layer)
                        for layer in checkpointed),
                      self.engine.before_optimizer_step(self._see_gradients)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin_micro_batch(self, _: nn.Module, inputs: tuple[Any, ...],
                           named: dict[str, Any]) -> None:
        teacher_hidden, targets = inputs[4], named["targets"]
        self.bytes["teacher_hidden"] += teacher_hidden.nbytes if teacher_hidden is not None else 0
        if targets is not None:
            self.bytes["teacher_targets"] += targets.nbytes
        self._see_gradients()
        self.kept, self.in_body = {}, True
        self.keeping.__enter__()

    def _begin_checkpointed_layer(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count a layer's input, which activation checkpointing keeps where autograd does not."""
        if self.in_body and inputs:
            self._keep(inputs[0])

    def _end_body(self, *_: Any) -> None:
        self.keeping.__exit__()
        self.in_body = False
        self._see("activations", sum(self.kept.values()))
        self._see("gathered", self.engine.gathered_now_bytes(self.student))

    def _see_gradients(self) -> None:
        self._see("gradients", self.engine.gradient_bytes())

    def _see(self, part: str, size: int) -> None:
        self.bytes[part] = max(self.bytes[part], size)

    def _keep(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        weights = (p.data.untyped_storage().data_ptr() for p in self.student.parameters())
        if address not in self.kept and address not in weights:
            self.kept[address] = tensor.untyped_storage().nbytes()
        return tensor


class _Traffic:
    """Bytes that this rank receives through torch's collectives, by purpose.

    Counted where torch hands a collective to its group: a dispatch mode would see them too, but
    nothing compiles in one.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.bytes: Counter[str] = Counter()
        first = world.rank - world.tp_rank
        self.tensor_parallel_ranks = list(range(first, first + world.tp_size))
        # Some have other names in other versions of torch.
        self.methods = {name: vars(ProcessGroup)[name] for name in RECEIVED_SHARE
                        if name in vars(ProcessGroup)}

    def __enter__(self) -> _Traffic:
        for name in self.methods:
            setattr(ProcessGroup, name, self._counting(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, method in self.methods.items():
            setattr(ProcessGroup, name, method)

    def _counting(self, name: str) -> Any:
        def call(group: ProcessGroup, tensors: Any, *rest: Any, **options: Any) -> Any:
            self._count(name, group, sum(tensor.nbytes for tensor in _tensors_in(tensors)))
            return self.methods[name].__get__(group)(tensors, *rest, **options)
        return call

    def _count(self, name: str, group: ProcessGroup, size: int) -> None:
        ranks = get_process_group_ranks(group)
        purpose = ("gathers" if "gather" in name else
                   "expert_exchange" if "all" in name and "to" in name else "reductions")
        if self.world.tp_size > 1 and ranks == self.tensor_parallel_ranks and name == "allreduce":
            purpose = "tensor_parallel"
        # torch's gloo sums for all ranks, twice the bytes, and each keeps its part.
        copies = 2 if "scatter" in name and self.world.device.type == "cpu" else 1
        self.bytes[purpose] += int(copies * size * RECEIVED_SHARE[name](len(ranks)))


def _tensors_in(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in _tensors_in(part)]
