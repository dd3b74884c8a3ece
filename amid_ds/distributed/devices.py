"""The device of a rank: its GPU, and the proof that no other rank computes on the same one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from amid_ds.errors import InputError, TrainingError

# Where a user tells torch's allocator how to work; torch reads the first that is set, when it first
# allocates.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# A step's tensors differ in size with the tokens that count: segments of fixed sizes would leave
# gaps that fit none of them.
ALLOCATOR_SETTINGS = "expandable_segments:True"


def choose_device(local_rank: int) -> torch.device:
    """The device of the rank `local_rank` of this host, made the current one.

    A rank may see all GPUs of its host or its own alone (`srun --gpus-per-task=1`). Where it sees
    several, but fewer than the host has ranks, two ranks get the same: `device_error` tells.
    """
    # DS_ACCELERATOR is DeepSpeed's own switch.
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if allocator_settings() is None:
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR_SETTINGS
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def allocator_settings() -> str | None:
    """What the environment tells torch's allocator of GPU memory; None: nothing."""
    return next((os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ), None)


def device_error(store: dist.Store, rank: int, size: int, device: torch.device
                 ) -> InputError | TrainingError | None:
    """What is wrong with the ranks' devices together, the same on every rank; None: nothing.

    Each rank must have a GPU of its own, or none of them a GPU. GPUs are compared by UUID: where
    each rank sees its own alone, all have the index 0. NCCL would refuse two ranks on one GPU too,
    later and with less to say. Every rank calls this, through `store` before any group exists.
    """
    uuid = None
    if device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    store.set(f"device/{rank}", json.dumps([socket.gethostname(), uuid]))
    ranks: dict[tuple[str, str | None], list[int]] = {}
    for other, answer in enumerate(store.multi_get([f"device/{each}" for each in range(size)])):
        host, uuid = json.loads(answer)
        ranks.setdefault((host, uuid), []).append(other)
    without = {host: group for (host, uuid), group in ranks.items() if uuid is None}
    if without and len(ranks) > len(without):
        where = "; ".join(f"{_name(group)} on {host}" for host, group in without.items())
        return TrainingError(
            f"no GPU is visible to {where}, but others have one\n  expected: a GPU for every rank, "
            "or for none\n  remedy:   see `nvidia-smi` and CUDA_VISIBLE_DEVICES there; leave the "
            "node out (sbatch --exclude)")
    shared = [f"{_name(group)} on {host} share the GPU {uuid}"
              for (host, uuid), group in ranks.items() if uuid is not None and len(group) > 1]
    return InputError(
        "; ".join(shared), "a GPU of its own for every rank",
        "start as many ranks per node as it has GPUs (--ntasks-per-node = --gpus-per-node), and "
        "let each see all of them, or its own alone (CUDA_VISIBLE_DEVICES)") if shared else None


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
