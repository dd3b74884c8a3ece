"""The table of devices, and the devices that torch names or describes."""

from __future__ import annotations

import types

import pytest
import torch

from amid_ds.planning import devices
from amid_ds.planning.devices import (
    DEVICES,
    device_by_properties,
    device_by_torch_name,
    find_device,
    local_device,
)

NAMES = {
    "NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl", "NVIDIA H200": "h200", "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA H20": "h20", "NVIDIA A100-SXM4-40GB": "a100-40g", "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g", "NVIDIA L40S": "l40s", "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200", "NVIDIA B300 SXM6 AC": "b300", "NVIDIA GB300": "gb300",
    "AMD Instinct MI300X": "mi300x", "AMD Instinct MI300X OAM": "mi300x",
    "AMD Instinct MI325X": "mi325x", "AMD Instinct MI355X": "mi355x"}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_the_name_that_torch_gives_it(name):
    assert device_by_torch_name(name, 1) is DEVICES[NAMES[name]]


@pytest.mark.parametrize("name", [
    # Others whose names hold a known one, and slices of known ones.
    "NVIDIA GH200 480GB", "NVIDIA H20-3e", "NVIDIA L40", "NVIDIA A100-SXM-64GB", "NVIDIA A10",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B2000"])
def test_another_device_is_not_taken_for_a_known_one(name):
    assert device_by_torch_name(name, 1) is None


def test_every_device_has_a_name_in_torch_and_a_chip_that_its_peaks_fit():
    assert set(devices.TORCH_NAMES) == set(DEVICES)
    for device in DEVICES.values():
        chip = device.chip
        assert chip is not None
        # FLOPs of a multiprocessor in a cycle: an architecture's tensor cores make a power of two,
        # and makers state their peaks at another clock than the one under load.
        per_cycle = device.flops / (chip.multiprocessors * chip.clock)
        assert 400 < per_cycle < 9000, device.name
        assert 0.5e12 < chip.bandwidth <= 8e12 and 30e9 < device.memory < 300e9
        # A link to other nodes is no faster than one to neighbours.
        assert device.bandwidth <= device.neighbours


def test_the_beginning_of_a_name_is_the_first_device_of_the_table():
    assert find_device("h100", 8) is DEVICES["h100-80g"]
    assert find_device("A100", 8) is DEVICES["a100-80g"]
    assert find_device("h20", 8) is DEVICES["h20"]
    assert find_device("h200", 8) is DEVICES["h200"]


def properties(**changes: object) -> types.SimpleNamespace:
    """What torch says of an H100, under a name that is not in the table."""
    return types.SimpleNamespace(**{
        "name": "NVIDIA Unheard", "major": 9, "minor": 0, "multi_processor_count": 132,
        "total_memory": 85_520_809_984, "clock_rate": 1_830_000, "memory_clock_rate": 2_619_000,
        "memory_bus_width": 5120, **changes})


def test_an_unknown_device_has_the_peaks_that_its_properties_give():
    device = device_by_properties(properties())
    known = DEVICES["h100-80g"]
    assert device.flops == pytest.approx(known.flops, rel=0.01)
    assert device.memory == 85_520_809_984
    assert device.chip.bandwidth == pytest.approx(known.chip.bandwidth, rel=0.01)
    assert (device.chip.multiprocessors, device.chip.clock) == (132, 1.83e9)
    half = device_by_properties(properties(name="NVIDIA GeForce RTX 4090", major=8, minor=9))
    workstation = device_by_properties(properties(name="NVIDIA RTX 6000 Ada", major=8, minor=9))
    assert half.flops == workstation.flops / 2


def test_a_peak_that_does_not_follow_from_the_properties_is_not_made_up(monkeypatch):
    assert device_by_properties(properties(major=17)) is None
    without_clock = properties()
    del without_clock.clock_rate
    assert device_by_properties(without_clock) is None
    assert device_by_properties(properties(memory_clock_rate=0)).chip is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    amd = properties(name="AMD Instinct", gcnArchName="gfx942:sramecc+", multi_processor_count=304,
                     clock_rate=2_100_000)
    assert device_by_properties(amd).flops == pytest.approx(DEVICES["mi300x"].flops, rel=0.01)


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H200", "h200"),
                                                ("NVIDIA Unheard", "NVIDIA Unheard")])
def test_the_device_of_a_run_is_the_known_one_or_described(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties(name=name))
    assert local_device(8).name == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device(2).name == "cpu"
