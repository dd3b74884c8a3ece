"""The device of a rank: its GPU, and the proof that no other rank computes on the same one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from amid_ds.errors import InputError, TrainingError

# Where a user tells torch's allocator how to work; torch reads the first that is set, when it first
# allocates.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# A step's tensors differ in size with the tokens that count: segments of fixed sizes would leave
# gaps that fit none of them.
ALLOCATOR_SETTINGS = "expandable_segments:True"
# Answers of the store at once, of some 70 bytes each.
RANKS_PER_REQUEST = 1024


def choose_device(local_rank: int) -> torch.device:
    """The device of the rank `local_rank` of this host, made the current one.

    A rank may see all GPUs of its host or its own alone (`srun --gpus-per-task=1`). Where it sees
    several, but fewer than the host has ranks, two ranks get the same: `introduce` tells.
    """
    # DS_ACCELERATOR is DeepSpeed's own switch.
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if allocator_settings() is None:
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR_SETTINGS
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def name_accelerator() -> None:
    """Tell DeepSpeed, before its import, which accelerator there is: it warns of a guess on stdout.

    transformers imports it too, where accelerate is installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def allocator_settings() -> str | None:
    """What the environment tells torch's allocator of GPU memory; None: nothing."""
    return next((os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ), None)


class Introduction(NamedTuple):
    """What ranks know of each other once all have come.

    hosts: by rank, on rank 0 all of them, elsewhere its own and rank 0's. on_host: the ranks of
    this rank's host. is_first_on_host: True for one of these. wrong: what is wrong with the ranks'
    devices together, the same on every rank; None: nothing.
    """

    hosts: Mapping[int, str]
    on_host: int
    is_first_on_host: bool
    wrong: InputError | TrainingError | None


def introduce(store: dist.Store, rank: int, size: int, device: torch.device) -> Introduction:
    """Tell the others of this rank's host and GPU, before any group exists. Every rank calls this.

    Each rank must have a GPU of its own, or none of them a GPU. GPUs are compared by UUID: where
    each rank sees its own alone, all have the index 0. NCCL would refuse two ranks on one GPU too,
    later and with less to say. Rank 0, which holds `store`, compares them: the others make four
    requests, on any number of ranks.
    """
    store = dist.PrefixStore("amid_ds", store)
    host, uuid = socket.gethostname(), None
    if device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    is_first = store.add(f"ranks on {host}", 1) == 1
    hosts = {rank: host}
    if rank:
        store.set(f"rank/{rank}", json.dumps([host, uuid]))
        hosts[0], wrong = json.loads(store.get("all have come"))
    else:
        places = [(host, uuid)]
        for first in range(1, size, RANKS_PER_REQUEST):
            places += map(json.loads, store.multi_get(
                [f"rank/{other}" for other in range(first, min(first + RANKS_PER_REQUEST, size))]))
        hosts = {other: place[0] for other, place in enumerate(places)}
        wrong = _shared_or_missing(places)
        store.set("all have come", json.dumps([host, wrong]))
    # An InputError has three parts.
    error = (None if wrong is None
             else InputError(*wrong) if len(wrong) == 3 else TrainingError(*wrong))
    return Introduction(hosts, store.add(f"ranks on {host}", 0), is_first, error)


def _shared_or_missing(places: Sequence[tuple[str, str | None]]) -> list[str] | None:
    """The arguments of the error in the ranks' (host, UUID of the GPU), None for no error."""
    ranks: dict[tuple[str, str | None], list[int]] = {}
    for rank, (host, uuid) in enumerate(places):
        ranks.setdefault((host, uuid), []).append(rank)
    without = {host: group for (host, uuid), group in ranks.items() if uuid is None}
    if without and len(ranks) > len(without):
        where = "; ".join(f"{_name(group)} on {host}" for host, group in without.items())
        return [f"no GPU is visible to {where}, but others have one\n  expected: a GPU for every "
                "rank, or for none\n  remedy:   see `nvidia-smi` and CUDA_VISIBLE_DEVICES there; "
                "leave the node out (sbatch --exclude)"]
    shared = [f"{_name(group)} on {host} share the GPU {uuid}"
              for (host, uuid), group in ranks.items() if uuid is not None and len(group) > 1]
    return ["; ".join(shared), "a GPU of its own for every rank",
            "start as many ranks per node as it has GPUs (--ntasks-per-node = --gpus-per-node), "
            "and let each see all of them, or its own alone (CUDA_VISIBLE_DEVICES)"
            ] if shared else None


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
