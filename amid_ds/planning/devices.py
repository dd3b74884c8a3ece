"""The devices that a plan knows, and the one that a name, a mapping or this process means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from amid_ds.config.strict import load_yaml
from amid_ds.errors import InputError

# Of a device's dense peak that large matrix products reach in training. An assumption: no step's
# time has been held against a GPU run yet.
EFFICIENCY = 0.45
# Of a device's memory that a plan may use. An assumption too: the rest goes to fragments, the CUDA
# context and NCCL.
HEADROOM = 0.92
# A CPU core, in FLOP/s: an assumption, about 3 GHz times 32 fp32 FLOPs a cycle. It is the peak of
# `perf/mfu` as well.
CPU_FLOPS_PER_CORE = 1e11
# Between processes of one machine, in bytes/s: an assumption for gloo over the loopback device.
CPU_BANDWIDTH = 2e9


@dataclass(frozen=True)
class Device:
    """One rank's device.

    `memory` in bytes; `flops`: dense bf16 FLOP/s; `bandwidth`, `neighbours`: bytes/s received from
    other nodes, and from ranks on the same one.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    neighbours: float


# By the makers' data sheets: memory, dense bf16 peak, one 400 Gb/s (A100: 200 Gb/s) port per
# device, and half of NVLink's 900 (A100: 600) GB/s, which the sheets count in both directions.
DEVICES = {device.name: device for device in (
    Device("h100-80g", 80e9, 989e12, 50e9, 450e9),
    Device("h200", 141e9, 989e12, 50e9, 450e9),
    Device("a100-80g", 80e9, 312e12, 25e9, 300e9))}
DEFAULT_DEVICE = "h100-80g"


def find_device(name: str, ranks_per_node: int) -> Device:
    """The device that `name` means for each of `ranks_per_node` ranks.

    A name of DEVICES, `cpu` for this machine's share, or a YAML mapping {memory: BYTES, flops:
    FLOP/s, bandwidth: BYTES/s} of finite numbers above 0. Raises InputError for any other, and for
    less than one rank.
    """
    require_ranks(1, ranks_per_node)
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        cores = psutil.cpu_count() or 1
        return Device("cpu", memory=psutil.virtual_memory().total / ranks_per_node,
                      flops=CPU_FLOPS_PER_CORE * cores / ranks_per_node,
                      bandwidth=CPU_BANDWIDTH, neighbours=CPU_BANDWIDTH)
    try:
        given = load_yaml(name)
        numbers = {key: float(value) for key, value in given.items()   # type: ignore[attr-defined]
                   if type(value) in (int, float)}
    except (AttributeError, ValueError, OverflowError):
        numbers = {}
    complete = numbers.keys() == {"memory", "flops", "bandwidth"}
    if not complete or not all(0 < number < math.inf for number in numbers.values()):
        raise InputError(f"the device {name!r}", f"one of {', '.join(DEVICES)}, cpu, or "
                         "{memory: BYTES, flops: FLOP/s, bandwidth: BYTES/s}, "
                         "each finite and above 0",
                         "name a device, or give its numbers")
    return Device("given", **numbers, neighbours=numbers["bandwidth"])


def require_ranks(nodes: int, ranks_per_node: int) -> None:
    """Raise InputError unless there is at least one node and one rank on it."""
    if nodes < 1 or ranks_per_node < 1:
        raise InputError(f"{nodes} node(s) of {ranks_per_node} rank(s)", "at least one of each",
                         "raise the number")


def local_device(local_ranks: int) -> Device | None:
    """The device of this process, one of `local_ranks` on its node; None: not in DEVICES."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return device_by_torch_name(name, local_ranks)


def device_by_torch_name(name: str, local_ranks: int) -> Device | None:
    """The device that torch calls `name` ("NVIDIA H200"), or `cpu`; None: not in DEVICES."""
    if name == "cpu":
        return find_device("cpu", local_ranks)
    return next((device for device in DEVICES.values()
                 if device.name.split("-")[0] in name.lower()), None)
