"""A rank that counts what it exchanges with the others: collectives, messages, store requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.ranks import rank_main

METHODS = ("broadcast", "allreduce", "reduce", "allgather", "all_gather_single", "_allgather_base",
           "gather", "scatter", "reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base",
           "alltoall", "alltoall_base", "all_to_all_single", "send", "recv", "barrier")


class Record(list):
    """[phase, owner, operation, payload in bytes] of each exchange of this rank.

    The phase is `start` before the first step, then the step's number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.stores: list[dist.Store] = []

    def note(self, owner: str, operation: str, size: int) -> None:
        self.append([self.phase, owner, operation, size])


class CountingStore(dist.Store):
    """The rendezvous store, whose requests go into `record`. torch's own come through it too."""

    def __init__(self, store: dist.Store, record: Record) -> None:
        super().__init__()
        self.store, self.record = store, record
        # C++ alone does not keep the Python object, without which it has no methods.
        record.stores.append(self)

    def _note(self, name: str, keys: Iterable[str], size: int = 0) -> None:
        keys = list(keys)
        # A group's keys are torch's.
        owner = "store" if keys[0].startswith("amid_ds/") else "torch's store"
        self.record.note(owner, name, sum(map(len, keys)) + size)

    def clone(self) -> CountingStore:
        return CountingStore(self.store.clone(), self.record)

    def set(self, key: str, value: Any) -> None:
        value = value if isinstance(value, (bytes, str)) else bytes(value)
        self._note("set", [key], len(value))
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self.store.get(key)
        self._note("get", [key], len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = self.store.multi_get(keys)
        self._note("multi_get", keys, sum(map(len, values)))
        return values

    def add(self, key: str, number: int) -> int:
        self._note("add", [key], 8)
        return self.store.add(key, number)

    def check(self, keys: list[str]) -> bool:
        self._note("check", keys, 1)
        return self.store.check(keys)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._note("wait", keys)
        self.store.wait(keys, *timeout)

    def delete_key(self, key: str) -> bool:
        self._note("delete", [key])
        return self.store.delete_key(key)

    def set_timeout(self, timeout: timedelta) -> None:
        self.store.set_timeout(timeout)


def count_collectives(record: Record) -> None:
    """Note each operation of a process group, where torch hands it to the group's backend."""
    def counting(name: str, method: Any) -> Any:
        def call(group, tensors=None, *rest, **options):
            size = sum(tensor.nbytes for tensor in _tensors_in(tensors))
            record.note(_owner(), name, size)
            return method.__get__(group)(*([] if tensors is None else [tensors]), *rest, **options)
        return call

    for name in METHODS:
        if name in vars(dist.ProcessGroup):
            setattr(dist.ProcessGroup, name, counting(name, vars(dist.ProcessGroup)[name]))


def _tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in _tensors_in(part)]


def _owner() -> str:
    """`ours` or `deepspeed`: whose code, the innermost one that is not torch's, makes the call."""
    frame = sys._getframe(2)
    while frame is not None:
        if "/deepspeed/" in frame.f_code.co_filename:
            return "deepspeed"
        if "/amid_ds/" in frame.f_code.co_filename:
            return "ours"
        frame = frame.f_back
    return "torch"


def exchanging_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes its Record to `log`.exchanges as JSON lines, at its last step."""
    from amid_ds.distributed import rendezvous
    from amid_ds.training.trainer import Trainer

    record, meet, reduce_info, finish = (Record(), rendezvous._meet, Trainer._reduce_info,
                                         Trainer._finish)

    def counted_meet(*arguments):
        return CountingStore(meet(*arguments), record)

    def at_step(trainer, fetched):
        record.phase = str(trainer.state.step + 1)
        return reduce_info(trainer, fetched)

    def at_end(trainer):
        record.phase = "end"
        finish(trainer)
        Path(f"{log}.exchanges").write_text(json.dumps(record))

    rendezvous._meet = counted_meet
    Trainer._reduce_info, Trainer._finish = at_step, at_end
    count_collectives(record)
    rank_main(argv, variables, log)
