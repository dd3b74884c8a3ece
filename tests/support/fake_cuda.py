"""A rank whose CUDA is faked: the code takes its GPU's branches, every tensor stays on the CPU.

torch.cuda's functions are replaced by ones with the same signatures, NCCL by gloo, and a tensor
that is asked for on `cuda` is made on the CPU. What it can show: which calls are made, with which
arguments, and where the host waits for the device. What it cannot: numbers of a GPU, streams that
run side by side, a tensor's `device.type`, kernels.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from support.host_waits import FakedDeviceName, HostWaits, is_cuda, mark_host_tensor, pinned_copy

DEVICE_NAME = "NVIDIA H100 80GB HBM3"
TOTAL_BYTES = 80 << 30


class FakeCuda:
    """`devices` faked GPUs in this process, and what was asked of them.

    first: the host's number of the first of them, which makes their UUIDs. calls: the names of the
    functions that were called, with their number; waits: where the host waits for a GPU, while that
    is watched.
    """

    def __init__(self, devices: int, free_bytes: int = 60 << 30, first: int = 0) -> None:
        self.devices, self.free_bytes, self.first = devices, free_bytes, first
        self.current = 0
        self.calls: Counter[str] = Counter()
        self.waits = HostWaits()
        # The arguments of each `init_process_group`.
        self.groups: list[dict[str, Any]] = []

    def install(self) -> None:
        """Replace torch.cuda, NCCL and DeepSpeed's accelerator in this process, for good."""
        for name, function in self._functions().items():
            self._replace(name, function)
        torch.cuda.Event, torch.cuda.Stream = _Event, FakeStream
        for kind in (_Event, FakeStream):
            kind.synchronize = self._recorded(kind.synchronize)
        torch.cuda.nccl.version = lambda: (2, 27, 5)
        torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = lambda message: 0, lambda: 0
        torch.Tensor.record_stream = lambda tensor, stream: self.calls.update(["record_stream"])
        torch.Tensor.pin_memory = pinned_copy
        self._replace_groups()
        self._replace_accelerator()
        _Mode(self).__enter__()

    def require(self, device: Any) -> int:
        """The index of `device`. Raises RuntimeError where there is no such GPU, as CUDA does."""
        device = torch.device(device) if isinstance(device, str) else device
        index = device if isinstance(device, int) else getattr(device, "index", None) or 0
        if index >= self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {self.devices})")
        return index

    def _functions(self) -> dict[str, Any]:
        stream = FakeStream()
        properties = types.SimpleNamespace(
            total_memory=TOTAL_BYTES, name=DEVICE_NAME, multi_processor_count=132, major=9,
            minor=0, uuid="00000000-0000-0000-0000-000000000000", clock_rate=1_980_000,
            memory_clock_rate=2_619_000, memory_bus_width=5120, L2_cache_size=50 << 20)

        def set_device(device):
            self.current = self.require(device)

        def get_device_properties(device=None):
            return types.SimpleNamespace(**{
                **vars(properties), "uuid": f"GPU-{self.first + self.require(device or 0)}"})

        def forget(device=None):
            return None

        return {
            **dict.fromkeys(("memory_reserved", "max_memory_reserved"),
                            lambda device=None: 3 << 30),
            **dict.fromkeys(("memory_allocated", "max_memory_allocated"),
                            lambda device=None: 1 << 30),
            "is_available": lambda: True, "device_count": lambda: self.devices,
            "set_device": set_device, "current_device": lambda: self.current,
            "current_stream": lambda device=None: stream,
            "default_stream": lambda device=None: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": self._recorded(forget),
            "empty_cache": lambda: None, "reset_peak_memory_stats": forget,
            "reset_max_memory_allocated": forget,
            "mem_get_info": lambda device=None: (self.free_bytes, TOTAL_BYTES),
            "get_device_name": lambda device=None: DEVICE_NAME,
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda including_emulation=True: True,
            "cudart": lambda: types.SimpleNamespace(
                cudaHostRegister=self._register, cudaHostUnregister=lambda pointer: 0),
            "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
            "get_device_properties": get_device_properties,
            "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda new_state, device="cuda": None}

    def _recorded(self, function: Any) -> Any:
        """`function`, whose caller waits for the device."""
        @functools.wraps(function)
        def recorded(*arguments, **options):
            self.waits.record("synchronize")
            return function(*arguments, **options)
        return recorded

    def _register(self, pointer: int, size: int, flags: int) -> int:
        """Pin memory, as CUDA's runtime does; returns its status."""
        assert pointer > 0 and size > 0
        self.calls["cudaHostRegister"] += 1
        return 0

    def _replace(self, name: str, function: Any) -> None:
        """Put `function` in the place of torch.cuda's, whose signature its callers must keep."""
        real = getattr(torch.cuda, name)

        @functools.wraps(real)
        def checked(*arguments, **options):
            self.calls[f"cuda.{name}"] += 1
            if inspect.isfunction(real):
                inspect.signature(real).bind(*arguments, **options)
            return function(*arguments, **options)

        setattr(torch.cuda, name, checked)

    def _replace_groups(self) -> None:
        real = dist.init_process_group

        def init_process_group(backend=None, *arguments, **options):
            bound = inspect.signature(real).bind(backend, *arguments, **options)
            self.groups.append(dict(bound.arguments))
            return real("gloo", *arguments,
                        **{key: value for key, value in options.items() if key != "device_id"})

        dist.init_process_group = init_process_group

    def _replace_accelerator(self) -> None:
        from deepspeed.accelerator import cuda_accelerator, set_accelerator

        class Accelerator(cuda_accelerator.CUDA_Accelerator):
            def on_accelerator(own, tensor):
                return True

            def device_name(own, device_index=None):
                if device_index is not None:
                    # DeepSpeed passes LOCAL_RANK as it stands in the environment.
                    self.require(int(device_index))
                return FakedDeviceName("cpu")

            def current_device_name(own):
                return FakedDeviceName("cpu")

            def device(own, device_index=None):
                return torch.device("cpu")

        os.environ["DS_ACCELERATOR"] = "cuda"
        set_accelerator(Accelerator())


class _Event:
    """torch.cuda.Event by the clock: reached 0.2 ms after it was recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False,
                 interprocess: bool = False) -> None:
        self.enable_timing, self.time = enable_timing, None

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return self.time is None or time.perf_counter() - self.time > 2e-4

    def synchronize(self) -> None:
        while not self.query():
            pass

    def wait(self, stream=None) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("an event without enable_timing")
        if self.time is None or end.time is None or not (self.query() and end.query()):
            raise RuntimeError("an event that was not recorded or not reached")
        return (end.time - self.time) * 1e3


class FakeStream:
    """torch.cuda.Stream in which all is done at once, but for the `unfinished` of all streams."""

    # Works of collectives, or anything else with `is_completed`.
    unfinished: ClassVar[list[Any]] = []

    def __init__(self, device=None, priority: int = 0, **_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return all(work.is_completed() for work in self.unfinished)

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Mode(TorchFunctionMode):
    """Makes on the CPU what is asked for on CUDA, and records where the host waits."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, function, types_, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        if function is torch.device or name == "device":
            return function(*args, **kwargs)
        self.fake.waits.see(name, args, kwargs)
        if is_cuda(kwargs.get("device")):
            self.fake.require(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        pinned = bool(kwargs.pop("pin_memory", False))
        if pinned:
            self.fake.calls["pin_memory"] += 1
        args = tuple(torch.device("cpu") if is_cuda(value) else value for value in args)
        result = function(*args, **kwargs)
        mark_host_tensor(result, pinned, kwargs)
        return result


def fake_cuda_rank(argv: list[str], variables: dict[str, str], log: str, *, devices: int = 8,
                   own: bool = False, watched_step: int | None = None) -> None:
    """Run as a rank on faked GPUs, of which it sees `devices`.

    own: the first of them is the host's GPU of the rank's number, as `srun --gpus-per-task=1` has
    it, and not the host's first. watched_step: the step (from 0) whose waits it writes to
    `log`.waits as JSON {place: number}.
    """
    from support.ranks import rank_main

    fake = FakeCuda(devices, first=int(variables["RANK"]) if own else 0)
    if watched_step is not None:
        _watch_step(fake, watched_step, Path(f"{log}.waits"))
    fake.install()
    rank_main(argv, variables, log)


def _watch_step(fake: FakeCuda, number: int, path: Path) -> None:
    """Watch from one agreement of the ranks to the next: the step, its log and what is due."""
    from amid_ds.training.trainer import Trainer

    reduce_info = Trainer._reduce_info

    def watched(trainer, fetched):
        if fake.waits.watching:
            path.write_text(json.dumps(fake.waits.places))
        fake.waits.watching = trainer.state.step == number
        return reduce_info(trainer, fetched)

    Trainer._reduce_info = watched
