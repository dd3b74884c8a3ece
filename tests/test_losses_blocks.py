"""Blocks of the fused loss: their length, the rows of their logits, and the products around them.

Nothing here needs a GPU: the rules are arithmetic, and torch's products for CUDA are imitated with
the signature that torch gives them.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import OBJECTIVES, LossProblem, relative_error
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from amid_ds import AMiD, LMHead, VocabShard
from amid_ds.losses import SummedHead, blocks, fused, linear_argmax, lm_head, summed_head, tiles
from amid_ds.losses.checks import VocabLayout
from amid_ds.planning.devices import DEVICES
from amid_ds.planning.memory import _loss_bytes

GIB = 1 << 30


def largest_allocation(work: Callable[[], object]) -> int:
    """Bytes of the largest allocation on the CPU while `work` runs, torch's own ones too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    return max((event.self_cpu_memory_usage for event in recorded.events()), default=0)


# --- the length of a block ------------------------------------------------------------------------

def waves(rows: int, columns: int, multiprocessors: int) -> float:
    """Rounds of a product, each as long as a 256 x 128 tile, with the best tile: counted one by
    one."""
    best = math.inf
    for height, width, at_once in [(256, 128, 1), (128, 256, 1), (192, 128, 1), (128, 192, 1),
                                   (128, 128, 2), (64, 256, 2)]:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        length = height * width * at_once / (256 * 128)
        best = min(best, math.ceil(tiles / (multiprocessors * at_once)) * length)
    return best


@pytest.mark.parametrize(("rows", "columns", "multiprocessors"), [
    (2048, 4096, 132), (1639, 4096, 132), (100, 128256, 132), (1, 1, 8), (3072, 2048, 148)])
def test_the_share_of_a_wave_is_the_output_over_the_slots_of_all_rounds(rows, columns,
                                                                       multiprocessors):
    slots = waves(rows, columns, multiprocessors) * multiprocessors * 256 * 128
    share = blocks.wave_share(rows, columns, multiprocessors)
    assert share == pytest.approx(rows * columns / slots)
    assert 0 < share <= 1


@given(st.integers(1, 40_000), st.integers(1, 12_000), st.sampled_from([32000, 50257, 151936]),
       st.sampled_from([1024, 4096]), st.sampled_from([108, 132, 148]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blocks_fit_the_workspace_and_no_multiple_of_256_is_faster(tokens, most, vocabulary, hidden,
                                                                   multiprocessors):
    size = blocks.accelerator_block(tokens, most, vocabulary, hidden, multiprocessors)
    assert 1 <= size <= most
    if tokens <= most:
        assert size == tokens
        return
    if most < 256:
        return
    assert size % 256 == 0

    def rounds(length: int) -> float:
        """Rounds of the products that depend on the cut, and the price of a block in rounds."""
        cut = [min(length, tokens - start) for start in range(0, tokens, length)]
        of_products = sum(
            2 * waves(n, vocabulary, multiprocessors) * hidden
            + waves(n, hidden, multiprocessors) * vocabulary for n in cut)
        price = 245 * vocabulary * hidden / (multiprocessors * 256 * 128)
        return of_products + len(cut) * price

    best = min(rounds(length) for length in range(256, most + 1, 256))
    assert rounds(size) <= best * (1 + 1e-9)


@pytest.mark.parametrize(("tokens", "vocabulary", "gib", "expected"), [
    # On 132 multiprocessors 2048 tokens are 256 tiles of the hidden states' gradient, in 2 rounds.
    (8192, 128256, 1, 2048), (8192, 128256, 2, 4096), (8192, 128256, 4, 8192),
    (8192, 262144, 1, 1024),
    # Not the longest that fit, which would leave a block of one token, or two of 1536 and 512.
    (8193, 128256, 1, 1536), (2048, 151936, 1, 1024)])
def test_tokens_are_cut_into_whole_rounds(tokens, vocabulary, gib, expected):
    most = gib * GIB // (4 * vocabulary)
    assert blocks.accelerator_block(tokens, most, vocabulary, 4096, 132) == expected


def test_a_cpu_has_blocks_of_nearly_equal_length():
    for tokens, most in [(100, 100), (101, 100), (1000, 300), (7, 3), (0, 5)]:
        size = blocks.equal_blocks(tokens, most)
        cut = [rows.stop - rows.start for rows in blocks.slices(tokens, size)]
        assert sum(cut) == tokens and len(cut) == math.ceil(tokens / most)
        assert all(n <= most for n in cut) and max(cut, default=0) - min(cut, default=0) <= len(cut)


@pytest.mark.parametrize(("memories", "gib"), [
    # What makers say and what cards of the kind report.
    ([24e9, 25.3e9], 1), ([40e9, 42.3e9], 1), ([80e9, 84.9e9, 85.5e9], 2), ([141e9, 150.7e9], 4),
    ([192e9, 206e9], 4), ([288e9, 309e9], 4)])
def test_the_workspace_is_a_step_of_the_memory_that_cards_of_one_kind_share(memories, gib):
    for memory in memories:
        assert blocks.default_workspace_bytes(memory) == gib * GIB
        assert gib == 1 or gib * GIB <= memory / 32
    assert blocks.default_workspace_bytes(None) == 96_000_000


def length(tokens: int, tiled: bool, shard: VocabShard | None = None, **options: object) -> int:
    layout = VocabLayout(shard or VocabShard(0, 151669), 151669, 151669, 151669)
    return blocks.tokens_per_block(tokens, layout, 4096, 4, options.get("workspace_bytes"),
                                   torch.device("cuda", 0), tiled)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    card = types.SimpleNamespace(total_memory=85e9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def test_the_tiles_of_plain_torch_take_their_part_of_the_workspace_and_kernels_take_none(h100):
    # A row of 151669 logits is as long as one of 151680.
    room = 3000 * 151680 * 4
    assert length(3000, tiled=False, workspace_bytes=room) == 3000
    tiles = 4 * (1 << 22) * 10
    assert length(3000, tiled=True, workspace_bytes=room) < 3000
    assert length(3000, tiled=True, workspace_bytes=room + tiles) == 3000


@pytest.mark.parametrize("tokens", [3538, 3539, 3540])
def test_a_plan_counts_the_bytes_of_the_blocks_that_the_loss_makes(h100, tokens):
    student = types.SimpleNamespace(head=151669 * 8, hidden_size=8, element_size=2, logit_size=2,
                                    head_is_trained=True, head_is_copied=False,
                                    body_is_trained=True)
    setting = types.SimpleNamespace(student=student, teacher=student, tokens=tokens,
                                    device=DEVICES["h100-80g"], on_cpu=False, losses_at_once=1)
    size = length(tokens, tiled=False)
    # 3539 rows of 151680 logits of both models fit 2 GiB.
    assert (size == tokens) == (tokens < 3540)
    of_head = 2 if size == tokens else 6
    assert _loss_bytes(setting) == (min(2 * GIB, tokens * 151680 * 4) + 151669 * 8 * of_head
                                    + tokens * 8 * 6)


def test_the_ranks_of_a_group_cut_the_blocks_of_the_least_of_their_devices(h100, monkeypatch):
    asked = []

    def least(self: VocabShard, subject: str, values: list[int], device: object) -> list[int]:
        asked.append(values)
        return [int(40e9), 108]

    alone = length(8192, tiled=False)
    monkeypatch.setattr(VocabShard, "least", least)
    together = length(8192, tiled=False, shard=VocabShard(0, 151669, group="peers"))
    assert asked == [[85e9, 132]]
    assert together < alone
    assert together == blocks.accelerator_block(8192, GIB // (4 * 151680), 151669, 4096, 108)


# --- rows of logits -------------------------------------------------------------------------------

@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as on a GPU."""
    monkeypatch.setitem(blocks.ROW_ALIGNMENT, "cpu", 64)


def test_rows_of_logits_begin_at_multiples_of_64_elements_on_a_gpu_and_are_dense_on_a_cpu():
    assert [blocks.row_stride(n, "cuda") for n in (151669, 50257, 128256, 1, 0)] == [
        151680, 50304, 128256, 64, 0]
    assert blocks.row_stride(50257, "cpu") == 50257


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_write_and_read_aligned_rows_without_a_copy(aligned, dtype, bias):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 24, generator=draw).to(dtype) for rows in (50, 1001))
    head = LMHead(weight, torch.randn(1001, generator=draw).to(dtype) if bias else None)
    workspace = torch.full((50 * 1024,), torch.nan, dtype=dtype)
    made = []
    logit_bytes = 50 * 1001 * dtype.itemsize
    assert largest_allocation(
        lambda: made.append(head.logits(hidden, 1001, workspace))) < logit_bytes / 2
    raw = made[0].raw
    assert raw.stride() == (1024, 1) and raw.data_ptr() == workspace.data_ptr()
    torch.testing.assert_close(raw, torch.nn.functional.linear(hidden, weight, head.bias))
    # The padding is nobody's.
    assert workspace.view(50, 1024)[:, 1001:].isnan().all()
    sums = lm_head.HeadGradients(hidden, head, 1001, dtype, (True, True, False), True)
    assert largest_allocation(
        lambda: sums.add(raw, hidden, torch.arange(50))) < logit_bytes / 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=str)
def test_aligned_rows_give_the_same_loss(aligned, monkeypatch, objective, backend):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 4)
    problem = LossProblem(dtype=torch.float64)
    truth = problem.naive(objective, softcap=3.0)
    mine = problem.to(torch.float32) if backend == "triton" else problem
    loss = mine.fused(objective, softcap=3.0, backend=backend).loss
    pairs = zip([loss, *mine.gradients(loss)], [truth, *problem.gradients(truth)], strict=True)
    tolerance = 2e-4 if backend == "triton" else 1e-9
    assert max(relative_error(actual.detach(), expected.detach())
               for actual, expected in pairs) < tolerance
    chosen = linear_argmax(problem.student, LMHead(problem.weight), vocab_size=40)
    assert torch.equal(chosen, (problem.student @ problem.weight[:40].t()).argmax(-1))


# --- the products that add up in fp32 -------------------------------------------------------------

@pytest.fixture
def cuda_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch's products of low precision in fp32, which a CPU does not have; the names called."""
    calls: list[str] = []
    real_mm, real_addmm = torch.mm, torch.addmm

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, **options) -> Tensor:
        if out_dtype is None:
            return real_mm(a, b, **options)
        assert a.dtype == b.dtype and a.dtype != out_dtype == torch.float32
        calls.append("mm")
        return real_mm(a.to(out_dtype), b.to(out_dtype), **options)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None,
              **options) -> Tensor:
        if out_dtype is None:
            return real_addmm(total, a, b, **options)
        assert a.dtype == b.dtype and total.dtype == out_dtype == torch.float32
        # Two objects of one memory would be copied to one another first.
        assert options["out"] is total
        calls.append("addmm")
        return real_addmm(total, a.to(out_dtype), b.to(out_dtype), **options)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(lm_head, "adds_in_fp32", lambda device, dtype: dtype == torch.float32)
    return calls


def test_gradients_are_added_up_in_fp32_by_one_product_each(cuda_products, monkeypatch):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 3)
    exact = LossProblem(9, 61, 16, 16, dtype=torch.float64)
    exact.weights[:] = 1
    problem = exact.to(torch.bfloat16)
    truth = exact.naive(AMiD(-5.0, 0.1))
    loss = problem.fused(AMiD(-5.0, 0.1)).loss
    gradients = problem.gradients(loss)
    # Three blocks of three tokens; nothing is left of a part that is made and then added.
    assert sorted(cuda_products) == ["addmm"] * 3 + ["mm"] * 3
    for actual, expected in zip(gradients, exact.gradients(truth), strict=True):
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) < 2e-2


def test_summed_logits_are_added_up_in_fp32_by_one_product_a_head(cuda_products, monkeypatch):
    """A capped head's are made by themselves, in as many parts as it takes."""
    monkeypatch.setattr(summed_head, "adds_in_fp32", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(tiles, "product_elements", lambda device: 5 * 30)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 32, generator=draw).bfloat16() for rows in (5, 61))
    bias = torch.randn(61, generator=draw).bfloat16()
    first, second = (x.double() @ y.double().t() for x, y in
                     zip(hidden.split(16, 1), weight.split(16, 1), strict=True))
    heads = SummedHead((LMHead(weight[:, :16], bias, scale=0.5), LMHead(weight[:, 16:])),
                       (0.7, -0.7))
    logits = heads.logits(hidden, 60, torch.full((5 * 61,), torch.nan))
    assert cuda_products == ["addmm"] * 2 and logits.raw.dtype == torch.float32
    truth = 0.7 * (0.5 * (first + bias.double()) - second)
    torch.testing.assert_close(logits.raw.double(), truth[:, :60], rtol=1e-5, atol=1e-5)
    capped = SummedHead((replace(heads.heads[0], softcap=2.0), heads.heads[1]), (0.7, -0.7))
    raw = capped.logits(hidden, 60, torch.full((5 * 61,), torch.nan)).raw
    assert cuda_products[2:] == ["mm", "mm", "addmm"]
    truth = 0.7 * (2 * (0.5 * (first + bias.double()) / 2).tanh() - second)
    torch.testing.assert_close(raw.double(), truth[:, :60], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tokens", "held"), [
    (torch.bfloat16, 3, torch.bfloat16), (torch.bfloat16, 4, torch.float32),
    # A loss scale comes in backward, after this gradient has been rounded.
    (torch.float16, 3, torch.float32)])
def test_a_single_block_in_bf16_holds_no_fp32_copy_of_the_heads_gradient(cuda_products, monkeypatch,
                                                                         dtype, tokens, held):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 3)
    kept = []
    real = lm_head.HeadGradients.totals
    monkeypatch.setattr(lm_head.HeadGradients, "totals",
                        lambda self: kept.append(self.weight.dtype) or real(self))
    exact = LossProblem(tokens, 61, 16, 16, dtype=torch.float64)
    exact.weights[:] = 1
    problem = exact.to(dtype)
    gradients = problem.gradients(problem.fused(AMiD(-5.0, 0.1)).loss)
    assert kept == [held]
    for actual, expected in zip(gradients, exact.gradients(exact.naive(AMiD(-5.0, 0.1))),
                                strict=True):
        assert actual.dtype == dtype and relative_error(actual, expected) < 2e-2


def test_products_in_fp32_are_asked_of_nvidias_gpus_alone(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    assert blocks.adds_in_fp32(gpu, torch.float32)
    assert not blocks.adds_in_fp32(cpu, torch.float32)
    assert not blocks.adds_in_fp32(gpu, torch.float64)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not blocks.adds_in_fp32(gpu, torch.float32)


def test_all_of_it_together_gives_the_naive_loss(h100, aligned, cuda_products, monkeypatch):
    """Blocks, rows and products as on a GPU, on 600 tokens in three blocks and in one."""
    real, lengths = blocks.tokens_per_block, []

    def as_on_a_gpu(tokens: int, layout: VocabLayout, hidden_size: int, element_bytes: int,
                    workspace_bytes: int | None, device: torch.device, tiled: bool) -> int:
        lengths.append(real(tokens, layout, hidden_size, element_bytes, workspace_bytes,
                            torch.device("cuda"), tiled=False))
        return lengths[-1]

    monkeypatch.setattr(fused, "tokens_per_block", as_on_a_gpu)
    exact = LossProblem(800, 41, 8, 8, dtype=torch.float64)
    truth = exact.gradients(exact.naive(AMiD(-5.0, 0.1)))
    problem = exact.to(torch.bfloat16)
    for workspace in (300 * 64 * 4, None):
        loss = problem.fused(AMiD(-5.0, 0.1), workspace_bytes=workspace).loss
        for actual, expected in zip(problem.gradients(loss), truth, strict=True):
            assert relative_error(actual, expected) < 2e-2
    assert lengths == [256, 600]


# --- backward -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [False, True])
def test_one_pass_scales_and_rounds_to_the_same_bits_as_two(dtype, per_row):
    gradient = torch.randn(201, 37, generator=torch.Generator().manual_seed(0))
    factor = torch.rand(201) if per_row else torch.tensor(1 / 3)
    by_row = factor[:, None] if per_row else factor.item()
    expected = (gradient * by_row).to(dtype)
    assert torch.equal(lm_head.scaled(gradient.clone(), factor, dtype), expected)
    # In place, and the factor is not rounded to the gradient's dtype.
    low = gradient.to(dtype)
    expected = (low.float() * by_row).to(dtype)
    assert lm_head.scaled(low, factor, dtype) is low
    assert torch.equal(low, expected)
    bias = gradient[:, 0].clone()
    assert torch.equal(lm_head.scaled(bias, torch.tensor(1 / 3), dtype),
                       (gradient[:, 0] * torch.tensor(1 / 3).item()).to(dtype))


def test_the_factor_has_dimensions_without_which_a_gpu_would_round_it_first(monkeypatch):
    factors, real = [], torch.mul
    monkeypatch.setattr(torch, "mul", lambda gradient, factor, out: factors.append(factor)
                        or real(gradient, factor, out=out))
    for shape in ((5, 3), (5,)):
        lm_head.scaled(torch.ones(shape, dtype=torch.bfloat16), torch.tensor(1 / 3), torch.bfloat16)
    assert [factor.dim() for factor in factors] == [2, 1]
    assert all(factor.dtype == torch.float32 for factor in factors)


def test_one_pass_makes_no_fp32_copy_of_the_gradient():
    gradient = torch.randn(5000, 64)
    allocated = largest_allocation(
        lambda: lm_head.scaled(gradient, torch.tensor(0.5), torch.bfloat16))
    assert allocated == gradient.numel() * 2
