"""A checkpoint's copy in host memory: pinned and used again on a GPU, which is faked here."""

from __future__ import annotations

import json
import mmap
import threading
import types

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main
from support.runs import write_recipe

from amid_ds.engine.staging import PinnedBuffers, tensors_in

STEPS = 3


def slow_disk_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank on a faked GPU, whose saves are written no sooner than the next one is due; it
    appends to `pins`, in the run, how many buffers were pinned by each step's end, and whether a
    save was being written."""
    from amid_ds.checkpoint import saver
    from amid_ds.engine.engine import Engine

    fake, due = FakeCuda(8), threading.Event()

    def before(owner, name, call):
        real = getattr(owner, name)

        def wrapped(*arguments, **options):
            call()
            return real(*arguments, **options)

        setattr(owner, name, wrapped)

    before(saver.Saver, "start", due.set)
    before(Engine, "stage_checkpoint", due.clear)
    before(saver, "write_file", due.wait)
    before(saver.Saver, "close", due.set)

    def around(trainer, batch):
        yield
        with open(trainer.job.run.path / "pins", "a") as file:
            file.write(json.dumps([fake.calls["cudaHostRegister"], trainer.saver.writing]) + "\n")

    patch_train_step(around)
    fake.install()
    rank_main(argv, variables, log)


def test_a_save_still_being_written_keeps_its_bytes_in_pinned_memory_that_the_next_uses(
        llama_pair, text_file, tmp_path):
    ranks = {name: Ranks(1, "train", write_recipe(
        tmp_path / f"{name}.yaml", *llama_pair, text_file, tmp_path / name, train__steps=STEPS,
        checkpoint__every=1, checkpoint__keep=STEPS), target=target)
        for name, target in {"cpu": rank_main, "gpu": slow_disk_rank}.items()}
    for each in ranks.values():
        assert each.wait() == [0], each.output()
    # Pinned at the first save, a buffer for each of two files, and never again.
    pins = [json.loads(line) for line in (tmp_path / "gpu" / "pins").read_text().splitlines()]
    assert pins == [[0, False], *[[2, True]] * (STEPS - 1)]
    for step in range(1, STEPS + 1):
        ours, theirs = (tmp_path / name / "checkpoints" / f"step_{step:08d}"
                        for name in ("gpu", "cpu"))
        assert len(list(theirs.glob("*.pt"))) == 2
        for path in theirs.glob("*.pt"):
            pairs = zip(*(tensors_in(torch.load(folder / path.name, weights_only=False))
                          for folder in (ours, theirs)), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), path
            # A file holds its own tensors, not the buffer that they were in.
            assert (ours / path.name).stat().st_size <= 1.1 * path.stat().st_size


@pytest.fixture
def pins(monkeypatch) -> list[int]:
    """The sizes that were pinned so far; negative ones were released."""
    sizes: dict[int, int] = {}
    log: list[int] = []

    def register(pointer, size, flags):
        assert pointer % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        sizes[pointer] = size
        log.append(size)
        return 0

    runtime = types.SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda pointer: log.append(-sizes.pop(pointer)))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return log


def test_a_buffer_is_pinned_once_and_anew_only_where_a_file_has_grown(pins):
    tensors = [torch.arange(5, dtype=torch.bfloat16), torch.tensor(2.5), torch.empty(0, 3),
               torch.arange(12.0).view(3, 4).t()]
    buffers = PinnedBuffers()
    first = buffers.copies("a", tensors)
    assert [torch.equal(*pair) for pair in zip(first, tensors, strict=True)] == [True] * 4
    assert [tensor.dtype for tensor in first] == [tensor.dtype for tensor in tensors]
    again = buffers.copies("a", [tensor + 1 for tensor in tensors])
    page = mmap.PAGESIZE
    assert pins == [page] and again[0].data_ptr() == first[0].data_ptr()
    buffers.copies("b", tensors)
    assert pins == [page, page]
    del first, again
    # Each tensor begins at a multiple of 64 bytes.
    buffers.copies("a", [*tensors, torch.zeros(page // 4 - 3 * 16)])
    assert pins == [page, page]
    buffers.copies("a", [*tensors, torch.zeros(page // 4 - 3 * 16 + 1)])
    assert pins == [page, page, -page, 2 * page]


def test_memory_that_cannot_be_pinned_is_said_and_used_as_it_is(monkeypatch, caplog):
    released, launched = [], []
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *_: 712,
                                    cudaHostUnregister=released.append)

    def zeros(*_, device):
        # As torch does at a kernel after a call that CUDA refused.
        launched.append(device)
        raise RuntimeError("CUDA error: part or all of the memory range is already mapped")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffers, tensor = PinnedBuffers(), torch.arange(25_000_000, dtype=torch.int32)
    monkeypatch.setattr(torch, "zeros", zeros)
    copied, = buffers.copies("a", [tensor])
    assert torch.equal(copied, tensor) and launched == ["cuda"]
    assert "0.1 GB of host memory" in caplog.text and "CUDA error 712" in caplog.text
    buffers.copies("a", [torch.ones(26_000_000, dtype=torch.int32)])
    assert released == []
