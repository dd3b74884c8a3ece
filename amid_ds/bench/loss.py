"""`bench loss`: the fused objective beside the naive twin and the bare matrix products.

The four products are those that any exact method has to make: teacher logits, student logits,
gradient of the hidden states, gradient of the head. Sparse targets need no product of the teacher:
their lines are ratios to the cross entropy alone, which makes the other three. Rounds are
interleaved, times are medians. Memory is the peak above the inputs: on a CPU the resident set of a
fresh process, on a GPU the allocator's peak. A row is printed when it has been measured; a method
that does not fit the device's memory has none.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from amid_ds import AMiD, PerToken, SparseTargets, linear_amid_loss, preset
from amid_ds.bench.measure import device_name, process_bytes, reset_peak_rss
from amid_ds.losses.measures import STATISTICS
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
# What else the objective can do, as further lines beside `amid`: what each costs.
FURTHER_KINDS = {
    "two temperatures": AMiD(-5.0, 0.1, temperature={"student": 2.0, "teacher": 1.5}),
    "powered": AMiD(-5.0, 0.1, power=1.5),
    "per token": AMiD(-5.0, PerToken("teacher_entropy", (0.1, 0.5), (0.0, 4.0)))}
WITH_STATISTICS = "statistics"
CROSS_ENTROPY = "cross entropy alone"
# Ids of a token's sparse targets: of the teacher's topk, and drawn ones.
KEPT_IDS, DRAWN_IDS = 64, 50
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

    The others are ratios to the naive twin's time, the products' time, the twin's memory, None
    where those did not fit the device; and to the cross entropy alone in time and memory, None but
    for sparse targets.
    """

    method: str
    seconds: float
    peak_bytes: int
    of_naive_time: float | None
    of_products_time: float | None
    of_naive_memory: float | None
    of_cross_entropy_time: float | None = None
    of_cross_entropy_memory: float | None = None


def bench_loss(as_json: bool) -> None:
    """`amid-ds bench loss`: measure at each shape of this device; print tables, or JSON alone."""
    results = []
    for shape in LOSS_SHAPES[_device()]:
        if not as_json:
            _print_title(shape)
        rows = []
        for row in measure_losses(shape):
            rows.append(asdict(row))
            if not as_json:
                _print_row(row)
        results.append({"shape": asdict(shape), "rows": rows})
    if as_json:
        print(json.dumps({"device": device_name(), "threads": torch.get_num_threads(),
                          "results": results}))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_losses(shape: LossShape, rounds: int | None = None) -> Iterator[LossRow]:
    """A row for every method that fits the device at `shape`, as soon as it is measured.

    All of them are timed in turn, for `rounds` (None: ROUNDS_BY_DEVICE) after one to warm up.
    """
    device = _device()
    seconds = _median_seconds(shape, device, rounds or ROUNDS_BY_DEVICE[device])
    naive_peak = cross_entropy_peak = None
    alone = next((name for name in seconds if name.endswith(CROSS_ENTROPY)), None)
    for name in seconds:
        try:
            peak = _peak_bytes(name, shape, device)
        except torch.OutOfMemoryError:
            continue
        if name == "naive":
            naive_peak = peak
        if name == alone:
            cross_entropy_peak = peak
        sparse = cross_entropy_peak is not None and "sparse" in name
        yield LossRow(name, seconds[name], peak, _ratio(seconds[name], seconds.get("naive")),
                      _ratio(seconds[name], seconds.get("products")), _ratio(peak, naive_peak),
                      _ratio(seconds[name], seconds[alone]) if sparse and alone else None,
                      _ratio(peak, cross_entropy_peak) if sparse else None)


def _ratio(value: float, to: float | None) -> float | None:
    return None if to is None else value / to


def _median_seconds(shape: LossShape, device: str, rounds: int) -> dict[str, float]:
    """Median seconds by method, of those that fit."""
    # After eight shapes of a function torch would run it eagerly.
    torch.compiler.reset()
    methods, inputs = _loss_methods(device, shape.objective), _Inputs(shape, device)
    seconds: dict[str, list[float]] = {}
    for name, method in methods.items():
        try:
            _timed(method, inputs)
            seconds[name] = []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, times in seconds.items():
            times.append(_timed(methods[name], inputs))
    return {name: statistics.median(times) for name, times in seconds.items()}


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
        # What is kept of a teacher that is as sure of the first ids as Zipf's law.
        first = torch.randint(v, (n, 1), generator=generator, device=device)
        ranks = torch.arange(min(KEPT_IDS, v - 1), device=device)
        p = 0.9 / (ranks + 1) / (1 / (ranks + 1)).sum()
        log_p, ids = p.log().expand(n, -1).contiguous(), (first + 7 * ranks) % v
        self.topk = SparseTargets(ids, log_p, torch.full((n,), math.log(0.1), device=device))
        drawn = slice(0, DRAWN_IDS)
        self.sample = SparseTargets(ids[:, drawn].contiguous(), log_p[:, drawn].contiguous(),
                                    weights=log_p[:, drawn].exp())


def _loss_methods(device: str, objective: str) -> dict[str, Callable[[_Inputs], None]]:
    # The naive twin first: the others' memory is a ratio to its.
    methods = {"naive": _naive, "products": _products, "amid_ds torch": _fused("torch")}
    if device == "cuda":
        methods |= {"naive, torch.compile": _compiled, "amid_ds triton": _fused("triton")}
        # pip install --no-deps liger-kernel
        if objective == "jsd" and importlib.util.find_spec("liger_kernel"):
            methods |= {"Liger, fused": _liger_fused, "Liger, chunked and compiled": _liger_chunked}
        # pip install --no-deps "trl>=1.16" accelerate
        if objective == "jsd" and importlib.util.find_spec("trl"):
            methods["TRL, chunked"] = _trl_chunked
    return methods | (_further_methods(device) if objective == "amid" else {})


def _further_methods(device: str) -> dict[str, Callable[[_Inputs], None]]:
    """Lines for FURTHER_KINDS, and for the objective itself with statistics."""
    backend = "triton" if device == "cuda" else "torch"
    methods = {kind: _fused(backend, objective) for kind, objective in FURTHER_KINDS.items()}
    methods[WITH_STATISTICS] = _fused(backend, statistics=STATISTICS)
    methods[CROSS_ENTROPY] = _on_labels_alone(backend)
    methods[f"sparse, ghost K={KEPT_IDS}"] = _on_targets(backend, "topk", BENCH_OBJECTIVES["amid"])
    methods[f"sparse, sample N={DRAWN_IDS}"] = _on_targets(backend, "sample", preset("fkl"))
    return {f"amid_ds {backend}, {kind}": method for kind, method in methods.items()}


def _liger_fused(x: _Inputs) -> None:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    loss(x.student, x.student_head, x.teacher, x.teacher_head, None).backward()


def _liger_chunked(x: _Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5,
                                   compiled=True)
    loss(x.student, x.student_head, x.teacher, x.teacher_head, x.labels).backward()


def _trl_chunked(x: _Inputs) -> None:
    """The loss of TRL's DistillationTrainer (1.16), in its own chunks; it has no public name."""
    from trl.trainer import distillation_trainer as trl

    everywhere = torch.ones(1, len(x.student), device=x.student.device)
    loss, *_ = trl._chunked_divergence_loss(
        x.student[None], x.teacher[None], x.student_head, x.teacher_head, everywhere, beta=0.5)
    loss.backward()


def _fused(backend: str, objective: AMiD | None = None,
           statistics: Sequence[str] = ()) -> Callable[[_Inputs], None]:
    """The fused loss; objective: None for that of the inputs."""
    def fused(x: _Inputs) -> None:
        out = linear_amid_loss(x.student, x.student_head, x.teacher, x.teacher_head,
                               objective or x.objective, token_weights=x.weights,
                               labels=x.labels if statistics else None,
                               statistics=statistics, backend=backend)
        out.loss.backward()
    return fused


def _on_labels_alone(backend: str) -> Callable[[_Inputs], None]:
    def alone(x: _Inputs) -> None:
        out = linear_amid_loss(x.student, x.student_head, None, None, None, backend=backend,
                               token_weights=x.weights, labels=x.labels, ce_weight=1.0,
                               kd_weight=0.0, checked=True)
        out.loss.backward()
    return alone


def _on_targets(backend: str, kind: str, objective: AMiD) -> Callable[[_Inputs], None]:
    """The fused loss on sparse targets, `topk` or `sample`, with the cross entropy beside it."""
    def on_targets(x: _Inputs) -> None:
        out = linear_amid_loss(x.student, x.student_head, None, None, objective, backend=backend,
                               token_weights=x.weights, labels=x.labels, ce_weight=1.0,
                               targets=getattr(x, kind), checked=True)
        out.loss.backward()
    return on_targets


def _naive(x: _Inputs, loss: Callable[..., Tensor] = naive_loss) -> None:
    student_logits = (x.student @ x.student_head.t()).float()
    teacher_logits = (x.teacher @ x.teacher_head.t()).float()
    per_token = loss(student_logits, teacher_logits, x.objective)
    torch.dot(per_token, x.weights).backward()


def _compiled(x: _Inputs) -> None:
    # Compiled once a shape, for its sizes alone: torch keeps the code.
    _naive(x, torch.compile(naive_loss, dynamic=False))


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


# Columns of the table: title, width, the row's value as text.
_COLUMNS: tuple[tuple[str, int, Callable[[LossRow], str]], ...] = (
    ("seconds", 10, lambda row: f"{row.seconds:.4f}"),
    ("× naive", 10, lambda row: _two_digits(row.of_naive_time)),
    ("× products", 11, lambda row: _two_digits(row.of_products_time)),
    ("peak MB", 10, lambda row: f"{row.peak_bytes / 1e6:.0f}"),
    ("× naive's", 10, lambda row: _two_digits(row.of_naive_memory)),
    ("× CE", 8, lambda row: _two_digits(row.of_cross_entropy_time)),
    ("× CE's MB", 11, lambda row: _two_digits(row.of_cross_entropy_memory)))


def _two_digits(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _print_title(shape: LossShape) -> None:
    print(f"N {shape.tokens}, V {shape.vocabulary}, "
          f"H {shape.student_hidden}/{shape.teacher_hidden}, {shape.dtype}, {shape.objective}; "
          f"forward and backward, {device_name()}, {torch.get_num_threads()} threads")
    _print_line("method", [title for title, *_ in _COLUMNS])


def _print_row(row: LossRow) -> None:
    _print_line(row.method, [text(row) for *_, text in _COLUMNS])


def _print_line(method: str, values: list[str]) -> None:
    columns = (f"{value:>{width}}" for value, (_, width, _) in zip(values, _COLUMNS, strict=True))
    # Seen at once, also through a pipe: what follows takes minutes.
    print(f"{method:34}{''.join(columns)}", flush=True)
