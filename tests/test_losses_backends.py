"""`auto` takes the kernels where they run, and plain torch, loudly and as a group, where not."""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.losses import LossProblem
from support.ranks import RankPool

from amid_ds import AMiD, VocabShard, linear_amid_loss
from amid_ds.errors import InputError
from amid_ds.losses import backends, elementwise

kernels = pytest.importorskip("amid_ds.losses.kernels")
LOGITS = [torch.zeros(1, 1, dtype=torch.bfloat16)]
ALONE = VocabShard(0, 1)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device counts as a GPU, and nothing has been tried yet."""
    monkeypatch.setattr(backends, "_is_gpu", lambda device: True)
    forget()
    yield
    forget()


def forget() -> None:
    backends._triton_runs.cache_clear()
    backends._say_once.cache_clear()


def choose(name: str = "auto", objective: AMiD | None = None) -> Any:
    return backends.choose_backend(name, objective or AMiD(), LOGITS, ALONE)


def test_auto_takes_the_kernels_after_one_small_one_has_run(monkeypatch):
    tried = []
    real = backends._try_kernel
    monkeypatch.setattr(backends, "_try_kernel", lambda device: tried.append(real(device)))
    assert [choose(), choose()] == [kernels, kernels]
    assert len(tried) == 1


@pytest.mark.parametrize("objective", [
    AMiD(-5.0, 0.1), AMiD(0.5, 0.1, "total_variation")], ids=["moments", "sums"])
def test_kernels_are_launched_on_their_tensors_device_not_the_current_one(objective, monkeypatch):
    entered: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.pop()

    class Launched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert len(entered) == 1 and entered[0].shape[0] == grid[0]
            launches.append(self.kernel)
            return self.kernel[grid]

    launches: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("normalisers", "kl_moments", "assistant", "sums", "gradient"):
        kernel = getattr(kernels.kernel_programs, f"{name}_kernel")
        monkeypatch.setattr(kernels.kernel_programs, f"{name}_kernel", Launched(kernel))
    LossProblem(tokens=2, vocabulary=5, dtype=torch.float32).fused(objective, backend="triton")
    assert len(launches) == (3 if objective.resolved_divergence.name == "kl" else 4)


FAILURES = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    ImportError("libcuda.so.1: undefined symbol cuTensorMapEncodeTiled"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    PermissionError(13, "Permission denied", "/home/me/.triton"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_auto_falls_back_where_triton_cannot_make_a_kernel_and_says_so_once(failure, monkeypatch,
                                                                            caplog):
    def fail(device: torch.device) -> None:
        raise failure

    monkeypatch.setattr(backends, "_try_kernel", fail)
    with caplog.at_level(logging.WARNING):
        assert [choose(), choose()] == [elementwise, elementwise]
    message, = [record.getMessage() for record in caplog.records]
    assert str(failure) in message and "plain torch" in message and "gcc" in message


@pytest.mark.parametrize("failure", [
    torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("illegal address"),
    RuntimeError("Triton Error [CUDA]: out of memory"), InputError("a", "b", "c")],
    ids=lambda failure: type(failure).__name__)
def test_what_is_wrong_with_the_device_is_no_reason_to_fall_back(failure, monkeypatch):
    def fail(device: torch.device) -> None:
        raise failure

    monkeypatch.setattr(backends, "_try_kernel", fail)
    with pytest.raises(type(failure)):
        choose()


def test_triton_by_name_is_not_tried_first_and_fails_itself(monkeypatch):
    monkeypatch.setattr(backends, "_try_kernel", pytest.fail)
    assert choose("triton") is kernels
    assert choose("torch") is elementwise


def lone_failure(rank: int, group: Any, broken: int) -> tuple[bool, int, list[torch.Tensor]]:
    """(the kernels are chosen, exchanges for that, loss and gradient); Triton fails on `broken`."""
    start, stop = [(0, 20), (20, 41)][rank]
    problem = LossProblem(dtype=torch.float32)
    shard = VocabShard(start, stop, group)

    def try_kernel(device: torch.device) -> None:
        if rank == broken:
            raise RuntimeError("no compiler here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_is_gpu", lambda device: True)
        patch.setattr(backends, "_try_kernel", try_kernel)
        forget()
        gathers = []
        real = VocabShard.gather
        patch.setattr(VocabShard, "gather",
                      lambda self, local: gathers.append(local) or real(self, local))
        chosen = [backends.choose_backend("auto", AMiD(), [problem.student], shard)
                  for _ in range(2)]
        exchanges = len(gathers)
        out = linear_amid_loss(problem.student, problem.weight[start:stop], problem.teacher,
                               problem.teacher_weight[start:stop], AMiD(-5.0, 0.1), shard=shard,
                               token_weights=problem.weights)
        gradient, = torch.autograd.grad(out.loss, [problem.student])
    assert chosen[0] is chosen[1]
    return chosen[0] is kernels, exchanges, [out.loss.detach(), gradient]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.mark.parametrize("broken", [-1, 0, 1])
def test_a_group_takes_the_kernels_together_or_not_at_all(ranks, broken):
    results = ranks.run(2, lone_failure, broken)
    assert [result[:2] for result in results] == [(broken == -1, 1)] * 2
    problem = LossProblem(dtype=torch.float64)
    truth = linear_amid_loss(problem.student, problem.weight[:41], problem.teacher,
                             problem.teacher_weight[:41], AMiD(-5.0, 0.1), backend="torch",
                             token_weights=problem.weights)
    gradient, = torch.autograd.grad(truth.loss, [problem.student])
    for _, _, (loss, of_hidden) in results:
        torch.testing.assert_close(loss.double(), truth.loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of_hidden.double(), gradient, rtol=1e-4, atol=1e-5)
