"""`bench loss`: the fused objective beside the naive twin and the bare matrix products.

The four products are those that any exact method has to make: teacher logits, student logits,
gradient of the hidden states, gradient of the head. Rounds are interleaved, times are medians.
Memory is the peak above the inputs: on a CPU the resident set of a fresh process, on a GPU the
allocator's peak.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from amid_ds import AMiD, linear_amid_loss, preset
from amid_ds.bench.measure import device_name, process_bytes, reset_peak_rss
from amid_ds.losses.reference import naive_loss
from amid_ds.losses.tiles import WORTH_COMPILING


@dataclass(frozen=True)
class LossShape:
    """The shape that one table is measured at. `objective` is a key of BENCH_OBJECTIVES."""

    tokens: int = 1024
    vocabulary: int = 50257
    student_hidden: int = 768
    teacher_hidden: int = 1600
    dtype: str = "float32"
    objective: str = "amid"


BENCH_OBJECTIVES = {"amid": AMiD(alpha=-5.0, lam=0.1), "jsd": preset("gkd", beta=0.5)}
# (vocabulary, student's width, teacher's width) on a GPU.
GPU_WIDTHS = ((128256, 4096, 4096), (128256, 2048, 4096), (151936, 2048, 4096))
LOSS_SHAPES = {
    "cpu": [LossShape()],
    "cuda": [LossShape(tokens, *widths, "bfloat16", objective) for widths in GPU_WIDTHS
             for tokens in (1024, 2048, 8192) for objective in ("jsd", "amid")],
}
ROUNDS_BY_DEVICE = {"cpu": 5, "cuda": 30}


@dataclass(frozen=True)
class LossRow:
    """One method: seconds of forward and backward (median), bytes of peak memory above the inputs.

    The other three are ratios to the naive twin's time, the products' time, the twin's memory.
    """

    method: str
    seconds: float
    peak_bytes: int
    of_naive_time: float
    of_products_time: float
    of_naive_memory: float


def bench_loss(as_json: bool) -> None:
    """`amid-ds bench loss`: measure at each shape of this device; print tables, or JSON alone."""
    results = []
    for shape in LOSS_SHAPES[_device()]:
        rows = measure_losses(shape)
        results.append({"shape": asdict(shape), "rows": [asdict(row) for row in rows]})
        if not as_json:
            _print_loss(rows, shape)
    if as_json:
        print(json.dumps({"device": device_name(), "threads": torch.get_num_threads(),
                          "results": results}))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_losses(shape: LossShape, rounds: int | None = None) -> list[LossRow]:
    """Every method at `shape`, in turn, for `rounds` after one to warm up.

    `rounds` None: ROUNDS_BY_DEVICE.
    """
    device = _device()
    methods = _loss_methods(device, shape.objective)
    inputs = _Inputs(shape, device)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_number in range(1 + (rounds or ROUNDS_BY_DEVICE[device])):
        for name, method in methods.items():
            elapsed = _timed(method, inputs)
            if round_number > 0:
                seconds[name].append(elapsed)
    del inputs
    peaks = {name: _peak_bytes(name, shape, device) for name in methods}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [LossRow(name, median[name], peaks[name], median[name] / median["naive"],
                    median[name] / median["products"], peaks[name] / peaks["naive"])
            for name in methods]


class _Inputs:
    """Random hidden states and heads of both models, with the scales of a trained model's."""

    def __init__(self, shape: LossShape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            values = torch.randn(rows, columns, generator=generator, device=device)
            return (values * scale).to(dtype)

        n, v, h_s, h_t = shape.tokens, shape.vocabulary, shape.student_hidden, shape.teacher_hidden
        self.student, self.teacher = normal(n, h_s, 1).requires_grad_(), normal(n, h_t, 1)
        self.student_head = normal(v, h_s, 2 * h_s**-0.5).requires_grad_()
        self.teacher_head = normal(v, h_t, 2 * h_t**-0.5)
        self.weights = torch.full((n,), 1 / n, device=device)
        # Liger's chunked loss wants labels.
        self.labels = torch.randint(v, (n,), generator=generator, device=device)
        self.objective = BENCH_OBJECTIVES[shape.objective]


def _loss_methods(device: str, objective: str) -> dict[str, Callable[[_Inputs], None]]:
    methods = {"products": _products, "naive": _naive, "amid_ds torch": _fused("torch")}
    if device == "cuda":
        methods |= {"naive, torch.compile": _compiled, "amid_ds triton": _fused("triton")}
        # pip install --no-deps liger-kernel
        if objective == "jsd" and importlib.util.find_spec("liger_kernel"):
            methods |= {"Liger, fused": _liger_fused, "Liger, chunked and compiled": _liger_chunked}
    return methods


def _liger_fused(x: _Inputs) -> None:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    loss(x.student, x.student_head, x.teacher, x.teacher_head, None).backward()


def _liger_chunked(x: _Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5,
                                   compiled=True)
    loss(x.student, x.student_head, x.teacher, x.teacher_head, x.labels).backward()


def _fused(backend: str) -> Callable[[_Inputs], None]:
    def fused(x: _Inputs) -> None:
        out = linear_amid_loss(x.student, x.student_head, x.teacher, x.teacher_head, x.objective,
                               token_weights=x.weights, backend=backend)
        out.loss.backward()
    return fused


def _naive(x: _Inputs, loss: Callable[..., Tensor] = naive_loss) -> None:
    student_logits = (x.student @ x.student_head.t()).float()
    teacher_logits = (x.teacher @ x.teacher_head.t()).float()
    per_token = loss(student_logits, teacher_logits, x.objective)
    torch.dot(per_token, x.weights).backward()


def _compiled(x: _Inputs) -> None:
    # Compiled once: torch keeps the code by function and shapes.
    _naive(x, torch.compile(naive_loss))


@torch.no_grad()
def _products(x: _Inputs) -> None:
    """The four products over all tokens at once, with nothing between them."""
    logits = x.student @ x.student_head.t()
    _ = x.teacher @ x.teacher_head.t()
    x.student.grad, x.student_head.grad = logits @ x.student_head, logits.t() @ x.student


def _timed(method: Callable[[_Inputs], None], inputs: _Inputs) -> float:
    """Seconds of one forward and backward."""
    inputs.student.grad = inputs.student_head.grad = None
    if torch.cuda.is_available():
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        method(inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    method(inputs)
    return time.perf_counter() - began


def _peak_bytes(name: str, shape: LossShape, device: str) -> int:
    """The method's peak memory above its inputs."""
    if device == "cuda":
        inputs = _Inputs(shape, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _loss_methods(device, shape.objective)[name](inputs)
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_peak, (name, shape, torch.get_num_threads()))


def _resident_peak(name: str, shape: LossShape, threads: int) -> int:
    """In a fresh process: the peak of the resident set above the inputs' and a first call's.

    The first call is large enough for the tiles to be compiled in it, because the compiler stays in
    the process. Linux.
    """
    torch.set_num_threads(threads)
    method = _loss_methods("cpu", shape.objective)[name]
    rows = math.ceil(WORTH_COMPILING / shape.vocabulary)
    method(_Inputs(LossShape(rows, shape.vocabulary, 64, 64), "cpu"))
    inputs = _Inputs(shape, "cpu")
    reset_peak_rss()
    before = process_bytes("VmRSS")
    method(inputs)
    return process_bytes("VmHWM") - before


def _print_loss(rows: list[LossRow], shape: LossShape) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"N {shape.tokens}, V {shape.vocabulary}, "
                        f"H {shape.student_hidden}/{shape.teacher_hidden}, "
                        f"{shape.dtype}, {shape.objective}; forward and backward, "
                        f"{device_name()}, {torch.get_num_threads()} threads")
    for heading in ("method", "seconds", "× naive", "× products", "peak MB", "× naive's"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(row.method, f"{row.seconds:.3f}", f"{row.of_naive_time:.2f}",
                      f"{row.of_products_time:.2f}", f"{row.peak_bytes / 1e6:.0f}",
                      f"{row.of_naive_memory:.2f}")
    Console().print(table)
