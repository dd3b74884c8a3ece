"""The devices that a plan knows, and the one that a name, a mapping or this process means."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import psutil

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
# A GPU that is not in the table, where its own properties say nothing: a port of 200 Gb/s, and a
# PCIe bus of the fourth generation.
UNKNOWN_BANDWIDTH = 25e9
UNKNOWN_NEIGHBOURS = 32e9
# Dense bf16 FLOPs of a multiprocessor in a cycle, by compute capability, and of AMD's by the name
# of its instruction set. Cards with "GeForce" in their name do half as many.
FLOPS_PER_CYCLE = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192,
                   (10, 3): 8192, (12, 0): 1024}
AMD_FLOPS_PER_CYCLE = {"gfx90a": 1024, "gfx942": 2048, "gfx950": 4096}


@dataclass(frozen=True)
class Chip:
    """What the time of the loss depends on, beside the peak of its products.

    `bandwidth`: bytes/s of the device's memory; `clock` in Hz; `lanes`: fp32 instructions that a
    multiprocessor starts in a cycle, counted by lane.
    """

    bandwidth: float
    multiprocessors: int
    clock: float
    lanes: int = 128


@dataclass(frozen=True)
class Device:
    """One rank's device.

    `memory` in bytes; `flops`: dense bf16 FLOP/s; `bandwidth`, `neighbours`: bytes/s received from
    other nodes, and from ranks on the same one. `chip`: None where it is not known.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    neighbours: float
    chip: Chip | None = None


# By the makers' data sheets: memory, dense bf16 peak (half of what sheets give "with sparsity"),
# one port per device of the network that its systems come with (200, 400 or 800 Gb/s), and half of
# the link between devices, which the sheets count in both directions (NVLink, Infinity Fabric, for
# L40S the PCIe bus); the memory's bandwidth, multiprocessors, clock under load. The sheets of
# H200, H20 and Blackwell name no multiprocessors and clocks: those are what drivers report.
DEVICES = {device.name: device for device in (
    Device("h100-80g", 80e9, 989e12, 50e9, 450e9, Chip(3.35e12, 132, 1.755e9)),
    Device("h100-pcie", 80e9, 756e12, 50e9, 300e9, Chip(2.0e12, 114, 1.755e9)),
    Device("h100-nvl", 94e9, 835e12, 50e9, 300e9, Chip(3.9e12, 132, 1.755e9)),
    Device("h200", 141e9, 989e12, 50e9, 450e9, Chip(4.8e12, 132, 1.755e9)),
    Device("h200-nvl", 141e9, 835e12, 50e9, 450e9, Chip(4.8e12, 132, 1.755e9)),
    Device("h20", 96e9, 148e12, 50e9, 450e9, Chip(4.0e12, 78, 1.83e9)),
    Device("a100-80g", 80e9, 312e12, 25e9, 300e9, Chip(2.039e12, 108, 1.41e9, lanes=64)),
    Device("a100-40g", 40e9, 312e12, 25e9, 300e9, Chip(1.555e12, 108, 1.41e9, lanes=64)),
    Device("l40s", 48e9, 362e12, 25e9, 32e9, Chip(0.864e12, 142, 2.52e9)),
    Device("b200", 180e9, 2250e12, 50e9, 900e9, Chip(7.7e12, 148, 1.85e9)),
    Device("gb200", 186e9, 2500e12, 50e9, 900e9, Chip(8.0e12, 152, 2.0e9)),
    Device("b300", 288e9, 2250e12, 100e9, 900e9, Chip(8.0e12, 148, 1.85e9)),
    Device("gb300", 279e9, 2500e12, 100e9, 900e9, Chip(8.0e12, 152, 2.0e9)),
    Device("mi300x", 192e9, 1307e12, 50e9, 448e9, Chip(5.3e12, 304, 2.1e9, lanes=64)),
    Device("mi325x", 256e9, 1307e12, 50e9, 448e9, Chip(6.0e12, 304, 2.1e9, lanes=64)),
    Device("mi355x", 288e9, 2517e12, 50e9, 538e9, Chip(8.0e12, 256, 2.4e9, lanes=64)))}
DEFAULT_DEVICE = "h100-80g"
# What torch calls them, such as "NVIDIA H100 80GB HBM3"; the first pattern that is found counts.
TORCH_NAMES = {
    "h100-pcie": r"\bh100 pcie", "h100-nvl": r"\bh100 nvl", "h100-80g": r"\bh100\b.*\bhbm3|\bh100$",
    "h200-nvl": r"\bh200 nvl", "h200": r"\bh200\b", "h20": r"\bh20$",
    "a100-40g": r"\ba100\b.*40gb", "a100-80g": r"\ba100\b.*80gb", "l40s": r"\bl40s\b",
    "b200": r"\bb200\b", "gb200": r"\bgb200\b", "b300": r"\bb300\b", "gb300": r"\bgb300\b",
    "mi300x": r"\bmi300x\b", "mi325x": r"\bmi325x\b", "mi355x": r"\bmi355x\b"}


def find_device(name: str, ranks_per_node: int) -> Device:
    """The device that `name` means for each of `ranks_per_node` ranks.

    A name of DEVICES, or its beginning ("h100", the first one of the table), `cpu` for this
    machine's share, or a YAML mapping {memory: BYTES, flops: FLOP/s, bandwidth: BYTES/s} of finite
    numbers above 0. Raises InputError for any other, and for less than one rank.
    """
    require_ranks(1, ranks_per_node)
    known = next((device for each, device in DEVICES.items()
                  if f"{each}-".startswith(f"{name.lower()}-")), None)
    if known is not None:
        return known
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
    return Device("given", numbers["memory"], numbers["flops"], numbers["bandwidth"],
                  neighbours=numbers["bandwidth"])


def require_ranks(nodes: int, ranks_per_node: int) -> None:
    """Raise InputError unless there is at least one node and one rank on it."""
    if nodes < 1 or ranks_per_node < 1:
        raise InputError(f"{nodes} node(s) of {ranks_per_node} rank(s)", "at least one of each",
                         "raise the number")


def local_device(local_ranks: int) -> Device | None:
    """The device of this process, one of `local_ranks` on its node.

    One that is not in DEVICES by its properties; None: its peak does not follow from them.
    """
    import torch

    if not torch.cuda.is_available():
        return find_device("cpu", local_ranks)
    properties = torch.cuda.get_device_properties()
    return device_by_torch_name(properties.name, local_ranks) or device_by_properties(properties)


def device_by_torch_name(name: str, local_ranks: int) -> Device | None:
    """The device that torch calls `name` ("NVIDIA H200"), or `cpu`; None: not in DEVICES.

    A slice of a device (MIG) is none of them.
    """
    if name == "cpu":
        return find_device("cpu", local_ranks)
    if " mig " in name.lower():
        return None
    return next((DEVICES[known] for known, pattern in TORCH_NAMES.items()
                 if re.search(pattern, name.lower())), None)


def device_by_properties(properties: Any) -> Device | None:
    """The device that torch's `get_device_properties` describes; None: its peak is not known.

    The peak follows from the clock and the multiprocessors by FLOPS_PER_CYCLE, the memory's
    bandwidth from its clock and bus; the links are assumed (UNKNOWN_BANDWIDTH,
    UNKNOWN_NEIGHBOURS).
    """
    import torch

    architecture = getattr(properties, "gcnArchName", "").partition(":")[0]
    per_cycle: float | None = (AMD_FLOPS_PER_CYCLE.get(architecture) if torch.version.hip
                               else FLOPS_PER_CYCLE.get((properties.major, properties.minor)))
    # torch gives clocks in kHz.
    clock = 1e3 * getattr(properties, "clock_rate", 0)
    if not per_cycle or not clock:
        return None
    if "geforce" in properties.name.lower():
        per_cycle /= 2
    # Two transfers a cycle, over a bus of so many bits.
    bandwidth = (2e3 * getattr(properties, "memory_clock_rate", 0)
                 * getattr(properties, "memory_bus_width", 0) / 8)
    lanes = 64 if torch.version.hip or (properties.major, properties.minor) == (8, 0) else 128
    chip = (Chip(bandwidth, properties.multi_processor_count, clock, lanes) if bandwidth else None)
    return Device(properties.name, properties.total_memory,
                  per_cycle * properties.multi_processor_count * clock, UNKNOWN_BANDWIDTH,
                  UNKNOWN_NEIGHBOURS, chip)
