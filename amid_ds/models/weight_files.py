"""The weight files of a model as a small table: their sizes, and where each tensor's bytes lie.

Only the safetensors headers are read. The table is what ranks agree on: one of them reads it, and
the others hold each file that they open against it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The dtypes of the safetensors format, by its names for them.
DTYPES_ON_DISK = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu}
# The format's own limit.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file.

    dtype: the file's name for it. offset: of its first byte; None in a pickled file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None = None


@dataclass(frozen=True)
class WeightFile:
    """A weight file as its header describes it.

    name: within the model's folder. changed_ns: time of the last change. digest: of the header, in
    hexadecimal; empty if it is pickled.
    """

    name: str
    size: int
    changed_ns: int
    digest: str
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class WeightTable:
    """The weight files of `model`, a folder or a repository on the hub at the commit `revision`.

    host: on which they were looked at; another's copies may have other times.
    """

    model: str
    revision: str | None
    host: str
    files: tuple[WeightFile, ...]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name; as for transformers, the last of two files counts."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    def paths(self) -> list[str]:
        """The files on this machine, in the order of `files`. Raises OSError if one is absent."""
        from transformers.utils import cached_file

        if Path(self.model).is_dir():
            return [str(Path(self.model) / file.name) for file in self.files]
        found = [cached_file(self.model, file.name, revision=self.revision, local_files_only=True)
                 for file in self.files]
        return [str(path) for path in found]


def read_weight_table(model: str, revision: str | None = None, fetch: bool = True,
                      named: str | None = None) -> WeightTable | None:
    """The table of the weights of `model`, from the headers alone.

    fetch: download the files of a model on the hub; False: None where they are not on this machine.
    named: the file that the model's config names. Raises what readers raise for damaged files.
    """
    paths = weight_paths(model, revision, fetch, named)
    if paths is None:
        return None
    root = (model if Path(model).is_dir()
            else os.path.commonpath([os.path.dirname(path) for path in paths]))
    files = []
    for path in paths:
        found = os.stat(path)
        tensors, digest = _header(path, found.st_size, found.st_mtime_ns)
        files.append(WeightFile(os.path.relpath(path, root), found.st_size, found.st_mtime_ns,
                                digest, tensors))
    return WeightTable(model, revision, socket.gethostname(), tuple(files))


def weight_paths(model: str, revision: str | None, fetch: bool, named: str | None
                 ) -> list[str] | None:
    """The paths of the weight files; None where they are on the hub and not to be fetched."""
    from huggingface_hub.constants import is_offline_mode
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        # is_remote_code: it does not ask the hub to convert pickles.
        files, _ = _get_resolved_checkpoint_files(
            model, variant=None, gguf_file=None, use_safetensors=None, user_agent=None,
            is_remote_code=True, transformers_explicit_filename=named,
            download_kwargs={"revision": revision, "local_files_only": not fetch})
    except OSError:
        if fetch or Path(model).is_dir() or is_offline_mode():
            raise
        return None
    return files


@functools.lru_cache(maxsize=4096)
def _header(path: str, size: int, changed_ns: int) -> tuple[tuple[StoredTensor, ...], str]:
    """(tensors, digest) of a weight file of that size and time of its last change.

    Kept, so a start that checks its models and then loads them reads a header once.
    """
    if path.endswith(".safetensors"):
        descriptor = open_for_ranges(path)
        try:
            header = read_header(descriptor, size)
        finally:
            os.close(descriptor)
        return _tensors(header, size), hashlib.sha256(header).hexdigest()
    from transformers.modeling_utils import load_state_dict

    pickled = load_state_dict(path, map_location="meta")
    return tuple(StoredTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                 for name, tensor in pickled.items()), ""


def open_for_ranges(path: str) -> int:
    """A descriptor of a file, for reads, of which the kernel reads nothing ahead.

    What follows the range of a rank is what others hold: read ahead, it can be as much again. Read
    a header so too: pages that were read ahead once start it again for every later reader.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def read_header(descriptor: int, size: int) -> bytes:
    """The header of an open safetensors file of `size` bytes, with the 8 bytes of its length.

    Raises ValueError if the file is too short for it.
    """
    begin = os.pread(descriptor, 8, 0)
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a file of {size} bytes ends before its header")
    header = os.pread(descriptor, length, 8)
    if len(header) < length:
        raise ValueError(f"a file of {size} bytes ends before its header")
    return begin + header


def _tensors(header: bytes, size: int) -> tuple[StoredTensor, ...]:
    """The tensors in the header of a file of `size` bytes.

    Raises ValueError unless they fill what follows the header, each with the bytes of its shape.
    """
    described = json.loads(header[8:].decode(), object_pairs_hook=_no_key_twice)
    tensors, places = [], []
    for name, value in described.items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, start, stop)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"the header's {name} has sizes that are no numbers")
        dtype = DTYPES_ON_DISK.get(value["dtype"])
        if dtype is not None and stop - start != torch.Size(shape).numel() * dtype.itemsize:
            raise ValueError(f"the header's {name} has {stop - start} bytes for {shape}")
        tensors.append(StoredTensor(name, str(value["dtype"]), shape, len(header) + start))
        places.append((start, stop))
    end = 0
    for start, stop in sorted(places):
        if start != end or stop < start:
            raise ValueError(f"the header leaves out or repeats bytes at {end}")
        end = stop
    if len(header) + end != size:
        raise ValueError(f"a file of {size} bytes, whose header describes {len(header) + end}")
    return tuple(tensors)


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("the header names a tensor twice")
    return content
