"""`bench loss --predict`: the time of the fused loss on a GPU that is not here, by its data sheet.

A roofline per part. A product takes its FLOPs at the rate of large products, over the share of the
multiprocessors' time that its tiles fill (`blocks.wave_share`); a kernel the longer of its
instructions and its bytes; everything else its bytes. The blocks are those that the loss itself
would make there. Nothing in it has been held against a GPU yet.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch

from amid_ds.errors import InputError
from amid_ds.losses.blocks import (
    accelerator_block,
    default_workspace_bytes,
    row_stride,
    tokens_that_fit,
    wave_share,
)
from amid_ds.losses.tiles import product_elements
from amid_ds.planning.devices import DEVICES, Chip, Device, find_device

# Shares that are reached, all of them assumptions: of the dense peak in large products, of the
# memory's bandwidth by a copy, of that copy by a kernel that computes as well, and of the slots for
# instructions by a kernel that also waits for memory.
PRODUCT_SHARE, COPY_SHARE, KERNEL_COPY_SHARE, ISSUE_SHARE = 0.8, 0.9, 0.9, 0.75
# Of reading and writing an fp32 sum within a product, what is not hidden behind the product.
EXPOSED_SHARE = 1 / 3
# Seconds of a launch and of its first and last tiles.
LAUNCH = 8e-6
# A size from which none is taken for that of a loss.
MOST_SIZE = 2**63
# Rows and columns of a product that is large enough to reach PRODUCT_SHARE.
LARGE = 8192
BF16, FP32 = 2, 4
# Machine instructions of the Triton kernels for each pair of logits, by kind of mixture and kernel,
# for KL and the order `pr` on sm_90; and exp2, log2 and reciprocals among them.
# tests/test_kernels_compiled.py compiles the kernels and compares.
INSTRUCTIONS_PER_PAIR = {
    "arithmetic": {"normalisers": (18.2, 2.2), "statistics": (30.1, 4.0), "gradient": (24.6, 3.0)},
    "geometric": {"normalisers": (18.2, 2.2), "statistics": (28.5, 2.1), "gradient": (27.1, 3.0)},
    "near_geometric": {"normalisers": (18.2, 2.2), "statistics": (44.4, 5.1),
                       "gradient": (45.1, 6.0)},
    "power": {"normalisers": (18.2, 2.2), "statistics": (34.4, 5.1), "gradient": (34.6, 6.0)}}
# Of one more reading, where statistics or numbers per token ask for all sums of both models.
MEASURES_PER_PAIR = (23.6, 2.0)
# A multiprocessor of sm_80 to sm_100 has 128 lanes for most fp32 instructions and 16 for exp2, log2
# and reciprocals (CUDA C++ programming guide, arithmetic throughput); assumed of other chips.
SLOTS_OF_SPECIAL = 8
# Bytes of each pair that a kernel reads and writes.
BYTES_PER_PAIR = {"normalisers": 2 * BF16, "statistics": 2 * BF16, "gradient": 3 * BF16,
                  "measures": 2 * BF16}


@dataclass(frozen=True)
class PredictedShape:
    """The sizes that a prediction is for; bf16, no token masked, one rank."""

    tokens: int = 8192
    vocabulary: int = 128256
    student_width: int = 4096
    teacher_width: int = 4096
    alpha: float = -1.0

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.vocabulary, self.student_width, self.teacher_width)
        if min(sizes) < 1 or max(sizes) >= MOST_SIZE or not math.isfinite(self.alpha):
            raise InputError(f"{self}", "sizes from 1 to 2^63 - 1 and a finite alpha",
                             "give such values")


@dataclass(frozen=True)
class LossPrediction:
    """Milliseconds of one forward and backward, by part, and of the four products by themselves.

    `products_ms`: the four products over all tokens at once, nothing between them; `ratio`: total
    over them. `block_products_ms`: the same products in the loss's blocks. `sums_ms`: adding up the
    weight's gradient over blocks. `rest_ms`: gathering tokens, scaling and rounding gradients.
    `measures_ms`: one more reading, for statistics or numbers per token; not in the total.
    """

    device: str
    block_tokens: int
    blocks: int
    products_ms: float
    block_products_ms: float
    kernels_ms: float
    sums_ms: float
    rest_ms: float
    total_ms: float
    ratio: float
    measures_ms: float


def predict_loss(device: Device, shape: PredictedShape) -> LossPrediction:
    """The prediction for a device whose chip is known. Raises InputError for any other."""
    if device.chip is None:
        raise InputError(f"--predict {device.name}",
                         f"one of {', '.join(DEVICES)}", "name a GPU of the table")
    model = _Roofline(device, device.chip, shape)
    n, v = shape.tokens, shape.vocabulary
    products = (model.product(n, v, shape.student_width) + model.product(n, v, shape.teacher_width)
                + model.product(n, shape.student_width, v)
                + model.product(v, shape.student_width, n))
    parts = {"block_products_ms": sum(count * model.block_products(size)
                                      for size, count in model.blocks.items()),
             "kernels_ms": model.kernels(), "sums_ms": model.sums(), "rest_ms": model.rest()}
    total = sum(parts.values())
    return LossPrediction(
        device.name, next(iter(model.blocks)), model.count, 1e3 * products,
        **{name: 1e3 * seconds for name, seconds in parts.items()}, total_ms=1e3 * total,
        ratio=total / products, measures_ms=1e3 * model.kernel("measures", *MEASURES_PER_PAIR))


class _Roofline:
    """Seconds of the parts of the loss on one chip, at one shape."""

    def __init__(self, device: Device, chip: Chip, shape: PredictedShape) -> None:
        self.chip, self.shape = chip, shape
        large = wave_share(LARGE, LARGE, chip.multiprocessors)
        self.product_rate = device.flops * PRODUCT_SHARE / large
        self.copy_rate = chip.bandwidth * COPY_SHARE
        # As the loss on ROCm: products are rounded before they are added up (lm_head.py).
        self.adds_in_products = not device.name.startswith("mi")
        gpu = torch.device("cuda")
        token_bytes = row_stride(shape.vocabulary, gpu.type) * 2 * BF16
        most = tokens_that_fit(default_workspace_bytes(device.memory), token_bytes, gpu, False)
        size = accelerator_block(shape.tokens, most, shape.vocabulary, shape.student_width,
                                 chip.multiprocessors)
        full, rest = divmod(shape.tokens, size)
        # Blocks by their tokens, the full ones first.
        self.blocks = {size: full, rest: 1} if rest else {size: full}
        self.count = sum(self.blocks.values())

    def product(self, rows: int, columns: int, inner: int) -> float:
        """[rows, inner] @ [inner, columns]."""
        share = wave_share(rows, columns, self.chip.multiprocessors)
        return 2 * rows * columns * inner / (self.product_rate * share) + LAUNCH

    def block_products(self, n: int) -> float:
        """The four products of a block of n tokens."""
        v, width = self.shape.vocabulary, self.shape.student_width
        if self.adds_in_products or self.count == 1:
            of_weight = self.product(v, width, n)
        else:
            parts = -(-v * width // product_elements(torch.device("cuda")))
            of_weight = parts * self.product(-(-v // parts), width, n)
        return (self.product(n, v, width) + self.product(n, v, self.shape.teacher_width)
                + self.product(n, width, v) + of_weight)

    def kernels(self) -> float:
        """Normalisers, statistics and gradient."""
        costs = INSTRUCTIONS_PER_PAIR[_mixture_kind(self.shape.alpha)]
        return sum(self.kernel(name, *cost) for name, cost in costs.items())

    def kernel(self, name: str, instructions: float, special: float) -> float:
        """One reading of all logits: instructions or bytes, the longer."""
        pairs = self.shape.tokens * self.shape.vocabulary
        slots = (self.chip.multiprocessors * self.chip.lanes * self.chip.clock) * ISSUE_SHARE
        bandwidth = self.copy_rate * KERNEL_COPY_SHARE
        return (max(pairs * issue_slots(instructions, special) / slots,
                    pairs * BYTES_PER_PAIR[name] / bandwidth) + self.count * LAUNCH)

    def sums(self) -> float:
        """The weight's gradient: a single block writes it in bf16; of several the first writes it
        in fp32, and each other reads it as well."""
        elements, count = self.shape.vocabulary * self.shape.student_width, self.count
        traffic = elements * (BF16 if count == 1 else FP32 * (2 * count - 1)) / self.copy_rate
        return traffic * EXPOSED_SHARE if self.adds_in_products or count == 1 else traffic

    def rest(self) -> float:
        """Tokens gathered, the hidden states' gradient scattered; backward, which reads gradients
        as they are held and writes them in bf16 (the hidden states' in two passes)."""
        n, student, teacher = self.shape.tokens, self.shape.student_width, self.shape.teacher_width
        gathered = n * (student + teacher) * 2 * BF16
        scattered = n * student * 3 * FP32
        held = BF16 if self.count == 1 else FP32
        backward = (n * student * (3 * FP32 + BF16)
                    + self.shape.vocabulary * student * (held + BF16))
        return (gathered + scattered + backward) / self.copy_rate


def issue_slots(instructions: float, special: float) -> float:
    """Issue slots of `instructions`, of which `special` wait for a narrow unit."""
    return max(instructions, SLOTS_OF_SPECIAL * special)


def _mixture_kind(alpha: float) -> str:
    """The key of INSTRUCTIONS_PER_PAIR: the kernels have a path of its own for each."""
    if alpha in (-1, 1):
        return "arithmetic" if alpha == -1 else "geometric"
    # Below |c| = ½ they need a series (losses/kernel_arguments.py, which needs Triton).
    return "near_geometric" if abs(1 - alpha) / 2 < 0.5 else "power"


def print_prediction(device: str, shape: PredictedShape, as_json: bool) -> None:
    """`amid-ds bench loss --predict`: a line for each part, or JSON alone."""
    found = predict_loss(find_device(device, 1), shape)
    if as_json:
        print(json.dumps({"shape": asdict(shape), **asdict(found)}))
        return
    print(f"predicted, not measured: {found.device}, N {shape.tokens}, V {shape.vocabulary}, "
          f"H {shape.student_width}/{shape.teacher_width}, bf16, α {shape.alpha:g}; "
          f"{found.blocks} block(s) of {found.block_tokens} tokens")
    for title, milliseconds in (
            ("the four products alone", found.products_ms),
            ("the four products in blocks", found.block_products_ms),
            ("kernels", found.kernels_ms), ("fp32 sums", found.sums_ms),
            ("gather, scale, round", found.rest_ms), ("total", found.total_ms)):
        print(f"  {title:30s}{milliseconds:8.2f} ms")
    print(f"  {'total / products alone':30s}{found.ratio:8.2f}")
    print(f"  {'measures, if asked for':30s}{found.measures_ms:8.2f} ms")
