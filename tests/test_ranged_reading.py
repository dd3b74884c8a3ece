"""A rank reads the ranges of weights that it holds, and no other bytes."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amid_ds.errors import InputError
from amid_ds.models import weight_reader
from amid_ds.models.weight_files import WeightTable, read_weight_table
from amid_ds.models.weight_map import HollowTensor, stored_sources
from amid_ds.models.weight_reader import ParameterSource, WeightReader

SHAPES = [(), (1,), (7,), (13, 5), (1, 9), (64, 33), (3, 4, 5), (2, 1, 6, 3), (129, 65)]


def stored_model(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of odd shapes in two safetensors files with an index; returned as safetensors reads
    them."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    tensors = {f"t{number}": torch.randn(shape, generator=generator).to(dtype)
               for number, shape in enumerate(SHAPES)}
    place = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({name: tensor for name, tensor in tensors.items() if place[name] == file},
                  folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": place}))
    return {name: load_file(folder / file)[name] for name, file in place.items()}


def opened(folder: Path) -> tuple[WeightTable, dict[str, ParameterSource]]:
    """The table and sources of the tensors in `folder`."""
    table = read_weight_table(str(folder))
    return table, stored_sources(table)


def hollow(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count], NaN, so that what is not filled shows."""
    return torch.full((count,), math.nan, dtype=dtype)


@pytest.mark.parametrize("chunk", [64, 16 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_any_range_of_any_part_is_what_safetensors_reads(chunk, dtype, wanted, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr(weight_reader, "READ_CHUNK_BYTES", chunk)
    truth = stored_model(tmp_path / "model", dtype)
    table, sources = opened(tmp_path / "model")
    chance = random.Random(0)
    reads, expected = [], []
    for name, whole in truth.items():
        assert (sources[name].shape, sources[name].dtype) == (tuple(whole.shape), dtype)
        for _ in range(20):
            source, tensor = sources[name], whole
            # A part of a part, along any dimension.
            for _ in range(chance.randrange(3) if whole.dim() else 0):
                dim = chance.randrange(tensor.dim())
                start = chance.randrange(tensor.shape[dim])
                stop = chance.randint(start + 1, tensor.shape[dim])
                source = source.part(dim, start, stop)
                tensor = tensor.narrow(dim, start, stop - start)
            assert source.shape == tuple(tensor.shape)
            # Also beyond the end, as the last partition of an odd size is.
            start = chance.randrange(tensor.numel() + 3)
            count = chance.randrange(tensor.numel() + 9)
            flat = torch.cat([tensor.flatten(), tensor.new_zeros(start + count)]).to(wanted)
            reads.append((source, start, hollow(count, wanted)))
            expected.append(flat[start:start + count])
    with WeightReader(table, sources) as reader:
        reader.fill(iter(reads))
    for (source, start, out), right in zip(reads, expected, strict=True):
        assert torch.equal(out, right), (source.shape, start, len(out))


def kernel_bytes() -> int:
    """The bytes that this process has asked of read calls so far, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_kernel_counts_the_bytes_of_the_ranges_and_no_more(tmp_path):
    truth = stored_model(tmp_path / "model", torch.bfloat16)
    table, sources = opened(tmp_path / "model")
    told: list[int] = []
    with WeightReader(table, sources, told.append) as reader:
        reader.fill([(source, 0, hollow(1, torch.float32)) for source in sources.values()])
        reads = [(sources[name], tensor.numel() // 3, hollow(tensor.numel() // 3, torch.float32))
                 for name, tensor in truth.items()]
        asked = 2 * sum(len(out) for *_, out in reads)
        before, own = kernel_bytes(), -reader.bytes_read
        own_cost = kernel_bytes() - before
        before = kernel_bytes()
        reader.fill(reads)
        assert kernel_bytes() - before - own_cost == asked == reader.bytes_read + own
        assert sum(told) == reader.bytes_read


def test_columns_of_a_page_or_more_are_read_without_those_between_them(tmp_path):
    (tmp_path / "model").mkdir()
    whole = torch.arange(40 * 8192, dtype=torch.float32).view(40, 8192)
    save_file({"w": whole}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    table, sources = opened(tmp_path / "model")
    part, out = sources["w"].part(1, 2048, 4096), hollow(40 * 2048, torch.float32)
    with WeightReader(table, sources) as reader:
        reader.fill([(part, 0, out)])
        assert reader.bytes_read == out.nbytes
    assert torch.equal(out.view(40, 2048), whole[:, 2048:4096])


def test_memory_is_chunks_however_large_a_range_is(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_reader, "READ_CHUNK_BYTES", 1000)
    truth = stored_model(tmp_path / "model", torch.float16)
    table, sources = opened(tmp_path / "model")
    for name, tensor in truth.items():
        boxes = [chunk for box in sources[name].range(0, tensor.numel())
                 for chunk in weight_reader.chunks(box)]
        assert sum(math.prod(box.sizes) for box, _ in boxes) == tensor.numel()
        assert max(read.elements * 2 for _, read in boxes) <= 1000
    # Allocated by each thread, once.
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty",
                        lambda *size, **kind: sizes.append(size) or empty(*size, **kind))
    with WeightReader(table, sources) as reader:
        reader.fill([(sources[name], 0, tensor.float().flatten())
                     for name, tensor in truth.items()])
    assert sizes == [(1000,)] * weight_reader.READ_THREADS


def cut_short(file: Path) -> None:
    with open(file, "r+b") as opened_file:
        opened_file.truncate(file.stat().st_size - 8)


def another_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    place = data.index(b'"t1"')
    data[place:place + 4] = b'"u1"'
    file.write_bytes(data)


@pytest.mark.parametrize("damage, words", [
    (cut_short, r"has \d+ bytes, not"), (another_header, "has another header"),
    (Path.unlink, "cannot be opened: No such file"),
    (lambda file: file.write_bytes(b""), "has 0 bytes, not"),
    (lambda file: os.utime(file, ns=(1, 1)), "was written to after")])
def test_a_file_that_is_not_the_one_whose_header_was_read_is_named(damage, words, tmp_path):
    stored_model(tmp_path / "model", torch.float32)
    table, sources = opened(tmp_path / "model")
    file = tmp_path / "model" / "part-1.safetensors"
    damage(file)
    with WeightReader(table, sources) as reader:
        out = hollow(7, torch.float32)
        reader.fill([(sources["t2"], 0, out)])   # the other file
        with pytest.raises(InputError, match=f"{file} {words}"):
            reader.fill([(source, 0, hollow(source.numel(), torch.float32))
                         for source in sources.values()])


def test_a_file_that_is_cut_or_written_to_while_it_is_read_is_an_error_and_no_signal(tmp_path):
    for name, change, words in (
            ("cut", lambda file: os.truncate(file, file.stat().st_size - 4000), "ends before byte"),
            ("written", lambda file: os.utime(file, ns=(1, 1)), "was written to while")):
        stored_model(tmp_path / name, torch.float32)
        table, sources = opened(tmp_path / name)
        large = sources[f"t{len(SHAPES) - 1}"]
        file = tmp_path / name / "part-0.safetensors"
        with WeightReader(table, sources) as reader:
            reader.fill([(large, 0, hollow(1, torch.float32))])
            change(file)
            with pytest.raises(InputError, match=words) as caught:
                reader.fill([(large, 0, hollow(large.numel(), torch.float32))])
        assert str(file) in str(caught.value) and "start again" in caught.value.remedy


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    stored_model(tmp_path / "model", torch.float32)
    table, sources = opened(tmp_path / "model")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with (WeightReader(table, sources) as reader,
          pytest.raises(InputError, match=r"part-1.safetensors fails at byte \d+: Input/output")):
        reader.fill([(sources["t1"], 0, hollow(1, torch.float32))])


def test_another_hosts_copy_may_have_another_time(tmp_path, monkeypatch):
    stored_model(tmp_path / "model", torch.float32)
    table, sources = opened(tmp_path / "model")
    os.utime(tmp_path / "model" / "part-1.safetensors", ns=(1, 1))
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    with WeightReader(table, sources) as reader:
        reader.fill([(sources["t1"], 0, hollow(1, torch.float32))])


def test_the_first_error_ends_the_reading_of_all_threads(tmp_path):
    stored_model(tmp_path / "model", torch.float32)
    table, sources = opened(tmp_path / "model")
    (tmp_path / "model" / "part-1.safetensors").unlink()
    taken = []

    def reads():
        yield sources["t1"], 0, hollow(1, torch.float32)
        for count in range(100_000):
            taken.append(count)
            yield sources["t0"], 0, hollow(1, torch.float32)

    with WeightReader(table, sources) as reader, pytest.raises(InputError, match="opened"):
        reader.fill(reads())
    assert len(taken) < 100_000


OPERATIONS = {
    "transpose": lambda x, y: x.transpose(0, -1),
    "permute": lambda x, y: x.permute(*reversed(range(x.dim()))),
    "cat": lambda x, y: torch.cat([x, y, x], dim=-1),
    "stack": lambda x, y: torch.stack([x, y], dim=1),
    "stack last": lambda x, y: torch.stack([y, x], dim=-1),
    "chunk": lambda x, y: x.chunk(2, dim=-1)[-1],
    "split": lambda x, y: x.split([1, x.shape[0] - 1])[1],
    "unbind": lambda x, y: x.unbind(-1)[0],
    "select": lambda x, y: x[-1],
    "slice": lambda x, y: x[1:, ...],
    "unsqueeze": lambda x, y: x.unsqueeze(-2),
    "squeeze": lambda x, y: x.squeeze(1),
    "cast": lambda x, y: x.to(torch.bfloat16).to(torch.float32).contiguous()}


@pytest.mark.parametrize("seed", range(60))
def test_a_hollow_tensor_follows_what_is_done_to_a_real_one(seed, tmp_path):
    """Bit by bit, in a random range, after up to six operations in a row."""
    chance = random.Random(seed)
    shape = [chance.randint(2, 5) for _ in range(chance.randint(2, 3))]
    real = {name: torch.randn(shape).bfloat16().float() for name in "xy"}
    (tmp_path / "model").mkdir()
    save_file(real, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    table, sources = opened(tmp_path / "model")
    pair = list(real.values())
    ghosts = [HollowTensor(shape, torch.float32, sources[name]) for name in real]
    done = []
    for _ in range(6):
        name = chance.choice(list(OPERATIONS))
        # An operation of both, so that their shapes stay the same.
        if pair[0].dim() < 2 or min(pair[0].shape) < 2 or pair[0].numel() > 5000:
            break
        done.append(name)
        operation = OPERATIONS[name]
        pair = [operation(*pair), operation(*reversed(pair))]
        ghosts = [operation(*ghosts), operation(*reversed(ghosts))]
    for tensor, ghost in zip(pair, ghosts, strict=True):
        assert isinstance(ghost.source, ParameterSource), (done, ghost.source)
        assert ghost.shape == tensor.shape == torch.Size(ghost.source.shape)
        start = chance.randrange(tensor.numel())
        out = hollow(tensor.numel() - start, torch.float32)
        with WeightReader(table, {}) as reader:
            reader.fill([(ghost.source, start, out)])
        assert torch.equal(out, tensor.flatten()[start:]), done


def test_a_hollow_tensor_says_what_it_could_not_follow():
    ghost = HollowTensor((4, 6), torch.float32, ParameterSource((4, 6), ()))
    for operation, name in ((lambda x: x * 2, "mul"), (lambda x: x.reshape(3, 8), "view"),
                            (lambda x: x[[0, 2]], "index"), (lambda x: x[::2], "slice")):
        assert operation(ghost).source == f"one of them is made by {name}"
        # It stays lost.
        assert torch.cat([ghost, operation(ghost)[:, :1].expand(-1, 6)]
                         ).source == f"one of them is made by {name}"


@pytest.mark.parametrize("change, words", [
    (lambda header: header["t1"].update(shape=[2]), "4 bytes for"),
    (lambda header: header["t1"].update(shape=[-1]), "no numbers"),
    (lambda header: header["t1"].update(data_offsets=[0, 5]), "5 bytes for"),
    (lambda header: header.pop("t3"), "leaves out or repeats")])
def test_a_header_that_does_not_describe_its_file_is_refused(change, words, tmp_path):
    stored_model(tmp_path / "model", torch.float32)
    file = tmp_path / "model" / "part-1.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    with pytest.raises(ValueError, match=words):
        read_weight_table(str(tmp_path / "model"))


def test_a_header_is_read_once_while_its_file_is_unchanged(tmp_path, monkeypatch):
    from amid_ds.models import weight_files

    stored_model(tmp_path / "model", torch.float32)
    calls = []
    read = weight_files.read_header
    monkeypatch.setattr(weight_files, "read_header",
                        lambda *arguments: calls.append(arguments) or read(*arguments))
    first = read_weight_table(str(tmp_path / "model"))
    assert read_weight_table(str(tmp_path / "model")) == first and len(calls) == 2
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    os.utime(tmp_path / "model" / "part-0.safetensors")
    read_weight_table(str(tmp_path / "model"))
    assert len(calls) == 3
