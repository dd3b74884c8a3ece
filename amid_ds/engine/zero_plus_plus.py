"""ZeRO++ beside a teacher: fewer bytes of the student between nodes, by a copy or by 8 bits.

hpZ: the first gather of a step puts a weight together from all ranks, each later one from a few
neighbours, which keep a copy of it among them until the optimizer's step. No number changes.

qwZ: the student's weights travel in 8 bits and a scale per some thousands of them. DeepSpeed would
round the teacher's and the heads' too; engine/gather.py keeps those as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from amid_ds.distributed.nodes import neighbour_group
from amid_ds.distributed.world import World
from amid_ds.errors import InputError


@contextlib.contextmanager
def secondary_groups_of_neighbours(rank: int) -> Iterator[None]:
    """A context in which DeepSpeed makes the groups of secondary partitions (hpZ) in one act.

    By itself it makes them one after the other, each by all ranks, and only once in a process.
    """
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group

    def create_own(size: int) -> None:
        first = rank // size * size
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = neighbour_group(range(first, first + size))

    groups._create_zero_param_parallel_group = create_own
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = create


def require_quantizer(world: World) -> None:
    """Raise InputError unless every rank can quantize weights (qwZ). Collective.

    DeepSpeed compiles its kernels the first time on a machine; torch lets one rank of a node do it,
    and the others wait.
    """
    if world.device.type == "cpu":
        raise InputError("zero_optimization.zero_quantized_weights: true on a CPU",
                         "GPUs: DeepSpeed quantizes by CUDA kernels", "take it out")
    world.run_checked(load_quantizer)


def load_quantizer() -> None:
    """Load DeepSpeed's kernels, compiled if need be. Raises InputError where that fails."""
    from deepspeed.ops.op_builder import QuantizerBuilder

    try:
        QuantizerBuilder().load(verbose=False)
    # A compiler may fail in any way, and so may the import of what it made.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"DeepSpeed's kernels for zero_quantized_weights cannot be compiled: {reason}",
            "a CUDA toolkit (nvcc) like torch's, g++ and ninja on every node",
            "install them, or take the key out") from None
