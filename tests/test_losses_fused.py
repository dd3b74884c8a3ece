"""The fused loss against the naive twin: values, gradients, precision, memory, refusals."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import EVERY_DIVERGENCE, OBJECTIVES, LossProblem, relative_error
from support.sparse import SparseProblem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amid_ds import AlphaBeta, AMiD, LMHead, amid_loss, linear_amid_loss, preset
from amid_ds.errors import InputError
from amid_ds.losses import fused, tiles
from amid_ds.losses.objective import ORDERS
from amid_ds.losses.reference import naive_loss

# --- values and gradients -------------------------------------------------------------------------

@pytest.mark.parametrize("measure", EVERY_DIVERGENCE, ids=str)
@pytest.mark.parametrize("order", [*ORDERS, {"pr": 0.5, "qr": 0.25, "rp": 1.0, "rq": 2.0}], ids=str)
def test_gradients_pass_gradcheck_for_every_divergence_and_order(measure, order):
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(3, 7, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 7, generator=draw, dtype=torch.float64)
    for alpha, lam in ((-5.0, 0.1), (-1.0, 0.5), (1.0, 0.3), (1.0001, 0.3), (3.0, 0.9), (2.0, 0.0),
                       (0.0, 1.0)):
        if measure == "total_variation" and lam == 0:
            continue  # D(q‖q): at the kink
        objective = AMiD(alpha, lam, measure, order, 1.5)
        assert torch.autograd.gradcheck(lambda s, o=objective: amid_loss(s, teacher, o), student)


def test_gradients_of_the_linear_loss_pass_gradcheck():
    problem = LossProblem(5, 7, 3, 4)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_amid_loss(hidden, LMHead(weight, bias, 4.0, 0.8), problem.teacher,
                                problem.teacher_weight, AMiD(-5.0, 0.1, temperature=2.0),
                                token_weights=problem.weights, labels=problem.labels, ce_weight=0.4,
                                vocab_size=7).loss

    assert torch.autograd.gradcheck(loss, problem.leaves())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.7), (None, 0.3)])
def test_the_linear_loss_matches_the_naive_twin(objective, softcap, scale):
    problem = LossProblem()
    ours = problem.fused(objective, softcap, scale).loss
    truth = problem.naive(objective, softcap, scale)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(problem.gradients(3 * ours), problem.gradients(3 * truth),
                                strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 30), st.integers(2, 70), st.integers(1, 2000), st.integers(1, 200),
       st.sampled_from(OBJECTIVES))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_blocks_and_tiles_of_any_size_agree(tokens, vocabulary, tile, block, objective):
    problem = LossProblem(tokens, vocabulary)
    truth = problem.naive(objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.TILE_ELEMENTS, "cpu", tile)
        patch.setattr(fused, "_tokens_per_block", lambda *_: block)
        ours = problem.fused(objective).loss
        per_token = amid_loss(problem.weight[:, :4].t()[:, :vocabulary],
                              problem.teacher_weight[:, :4].t(), objective, vocab_size=vocabulary)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(problem.gradients(ours), problem.gradients(truth), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    expected = naive_loss(problem.weight[:vocabulary, :4].t(),
                          problem.teacher_weight[:vocabulary, :4].t(), objective)
    torch.testing.assert_close(per_token, expected, rtol=1e-10, atol=1e-12)


def test_any_number_of_threads_gives_the_same_loss():
    problem = LossProblem(40, 997, dtype=torch.float32)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiles.TILE_ELEMENTS, "cpu", 2000)
                out = problem.fused(OBJECTIVES[1])
            results.append([out.loss.detach(), out.kd, out.ce])
    finally:
        torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def test_leading_dimensions_and_padded_widths_of_logits():
    student = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 15, dtype=torch.float64)
    loss = amid_loss(student, teacher, AMiD(), vocab_size=10)
    truth = naive_loss(student[..., :10], teacher[..., :10], AMiD())
    torch.testing.assert_close(loss, truth)
    weights = torch.rand(2, 3, dtype=torch.float64)
    actual, = torch.autograd.grad((loss * weights).sum(), student)
    expected, = torch.autograd.grad((truth * weights).sum(), student)
    torch.testing.assert_close(actual, expected)
    assert (actual[..., 10:] == 0).all()


def test_logits_that_are_not_contiguous():
    student = torch.randn(12, 5, dtype=torch.float64).t().requires_grad_()
    teacher = torch.randn(5, 24, dtype=torch.float64)[:, ::2]
    assert torch.autograd.gradcheck(lambda s: amid_loss(s, teacher, AMiD()), student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_in_and_out(dtype):
    problem = LossProblem(dtype=dtype)
    out = problem.fused(AMiD())
    assert (out.loss.dtype, out.kd.dtype, out.ce.dtype) == (torch.float32,) * 3
    assert not out.kd.requires_grad and not out.ce.requires_grad
    assert [g.dtype for g in problem.gradients(out.loss)] == [dtype] * 3
    assert amid_loss(problem.student, problem.student, AMiD()).dtype == torch.float32


def test_a_student_and_a_teacher_of_different_dtypes():
    problem = LossProblem(dtype=torch.float32)
    expected = problem.fused(AMiD()).loss
    problem.teacher = problem.teacher.bfloat16()
    problem.teacher_weight = problem.teacher_weight.bfloat16()
    torch.testing.assert_close(problem.fused(AMiD()).loss, expected, rtol=0.02, atol=0.02)


# --- masks, labels and weights --------------------------------------------------------------------

def test_per_token_values_are_the_losss_parts_and_zero_where_masked():
    problem = LossProblem()
    out = problem.fused(AMiD(-5.0, 0.1))
    total = (problem.weights * (0.9 * out.kd + 0.4 * out.ce)).sum()
    torch.testing.assert_close(out.loss.detach(), total)
    assert (out.kd[problem.weights == 0] == 0).all() and (out.ce[problem.weights == 0] == 0).all()
    assert (out.ce[problem.labels == -100] == 0).all()
    assert (out.kd[problem.weights > 0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_may_be_of_any_integer_dtype(dtype):
    problem = LossProblem(vocabulary=200)
    problem.labels.clamp_(min=0, max=100 if dtype == torch.int8 else 199)
    problem.labels[1] = 2 if dtype == torch.uint8 else -100
    # 156 is -100 in eight bits.
    problem.labels[2] = 100 if dtype == torch.int8 else 156
    narrow = LossProblem(vocabulary=200)
    narrow.labels = problem.labels.to(dtype)
    assert problem.fused(AMiD()).ce.equal(narrow.fused(AMiD()).ce)


def test_a_masked_token_contributes_exactly_nothing_whatever_it_holds():
    problem, other = LossProblem(), LossProblem()
    masked = problem.weights == 0
    with torch.no_grad():
        other.student[masked], other.teacher[masked] = float("nan"), float("inf")
    ours, theirs = problem.fused(AMiD()).loss, other.fused(AMiD()).loss
    assert torch.equal(ours, theirs)
    gradients = other.gradients(theirs)
    for actual, expected in zip(gradients, problem.gradients(ours), strict=True):
        assert torch.equal(actual, expected)
    assert (gradients[0][masked] == 0).all()


def test_masked_tokens_cost_nothing(seen):
    problem = LossProblem(tokens=40)
    problem.weights[:] = 0
    problem.weights[7] = 1
    with seen:
        problem.fused(AMiD()).loss.backward()
    products = [shapes for name, shapes in seen.calls if name in ("mm", "addmm", "addmm_")]
    assert products and all(40 not in shape for shapes in products for shape in shapes)


def test_no_valid_token_gives_zero_and_zero_gradients():
    problem = LossProblem()
    problem.weights[:] = 0
    out = problem.fused(AMiD())
    assert out.loss.item() == 0 and out.loss.requires_grad
    assert all((g == 0).all() and g.shape == x.shape
               for g, x in zip(problem.gradients(out.loss), problem.leaves(), strict=True))


def test_no_token_at_all():
    problem = LossProblem()
    for name in ("student", "teacher", "weights", "labels"):
        setattr(problem, name, getattr(problem, name)[:0].detach())
    problem.student.requires_grad_()
    out = problem.fused(AMiD())
    assert out.loss.item() == 0 and out.kd.shape == (0,)
    assert problem.gradients(out.loss)[1].abs().max() == 0
    assert amid_loss(torch.zeros(0, 5), torch.zeros(0, 5), AMiD()).shape == (0,)


def test_cross_entropy_alone_needs_no_teacher():
    problem = LossProblem()
    out = linear_amid_loss(problem.student, problem.weight, None, None, None,
                           token_weights=problem.weights, labels=problem.labels, ce_weight=0.7,
                           kd_weight=0.0)
    truth = 0.7 * (problem.weights * F.cross_entropy(problem.student @ problem.weight.t(),
                                                     problem.labels, reduction="none")).sum()
    torch.testing.assert_close(out.loss, truth)
    assert out.kd is None
    for actual, expected in zip(torch.autograd.grad(out.loss, problem.leaves()[:2]),
                                torch.autograd.grad(truth, problem.leaves()[:2]), strict=True):
        torch.testing.assert_close(actual, expected)


def test_temperature_leaves_cross_entropy_alone():
    problem = LossProblem()
    cold, warm = problem.fused(AMiD(temperature=1.0)), problem.fused(AMiD(temperature=4.0))
    torch.testing.assert_close(cold.ce, warm.ce)
    assert not torch.allclose(cold.kd, warm.kd)


def test_padding_columns_have_no_part_and_no_gradient():
    problem, other = LossProblem(), LossProblem()
    with torch.no_grad():
        other.weight[problem.vocab_size:] = 100
        other.teacher_weight[problem.vocab_size:] = float("inf")
    ours, theirs = problem.fused(AMiD()).loss, other.fused(AMiD()).loss
    assert torch.equal(ours, theirs)
    _, weight, bias = other.gradients(theirs)
    assert (weight[problem.vocab_size:] == 0).all() and (bias[problem.vocab_size:] == 0).all()


# --- autograd -------------------------------------------------------------------------------------

def test_only_what_requires_a_gradient_gets_one_and_the_teacher_never():
    problem = LossProblem()
    problem.weight.requires_grad_(False)
    problem.teacher.requires_grad_()
    problem.teacher_weight.requires_grad_()
    problem.fused(AMiD()).loss.backward()
    assert problem.weight.grad is None and problem.teacher.grad is None
    assert problem.teacher_weight.grad is None
    assert problem.student.grad is not None and problem.bias.grad is not None


def test_gradients_may_be_kept_for_a_second_backward_or_are_given_away():
    problem = LossProblem()
    loss = problem.fused(AMiD()).loss
    first = torch.autograd.grad(loss, problem.leaves(), retain_graph=True)
    second = torch.autograd.grad(2 * loss, problem.leaves())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, problem.leaves())


def test_a_second_derivative_is_refused():
    problem = LossProblem()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(problem.fused(AMiD()).loss, problem.student, create_graph=True)


def test_gradients_accumulate_over_micro_batches():
    problem = LossProblem()
    whole = problem.gradients(problem.fused(AMiD()).loss)
    for part in (slice(0, 4), slice(4, 11)):
        linear_amid_loss(problem.student[part], LMHead(problem.weight, problem.bias),
                         problem.teacher[part], problem.teacher_weight, AMiD(),
                         token_weights=problem.weights[part], labels=problem.labels[part],
                         ce_weight=0.4, kd_weight=0.9, vocab_size=41).loss.backward()
    for actual, expected in zip(problem.leaves(), whole, strict=True):
        torch.testing.assert_close(actual.grad, expected)


def test_autocast_and_inference_mode_change_nothing():
    problem = LossProblem(dtype=torch.float32)
    expected = problem.fused(AMiD())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(problem.fused(AMiD()).loss, expected.loss)
    with torch.inference_mode():
        assert torch.equal(problem.fused(AMiD()).loss, expected.loss)
    with torch.no_grad():
        assert not problem.fused(AMiD()).loss.requires_grad


def test_under_activation_checkpointing_the_gradients_are_the_same():
    from torch.utils.checkpoint import checkpoint

    problem = LossProblem()
    expected = problem.gradients(problem.fused(AMiD()).loss)
    for reentrant in (False, True):
        hidden = checkpoint(lambda x: x * 1.0, problem.student, use_reentrant=reentrant)
        loss = linear_amid_loss(hidden, LMHead(problem.weight, problem.bias), problem.teacher,
                                problem.teacher_weight, AMiD(), token_weights=problem.weights,
                                labels=problem.labels, ce_weight=0.4, kd_weight=0.9,
                                vocab_size=41).loss
        loss.backward()
        for leaf, gradient in zip(problem.leaves(), expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)
            leaf.grad = None


# --- precision ------------------------------------------------------------------------------------

@pytest.mark.parametrize("measure", EVERY_DIVERGENCE, ids=str)
def test_fp32_stays_within_its_error_budget(measure):
    """Relative to fp64: values 2e-4; gradients 2e-4, of the α-β divergence 1e-3."""
    budget = 1e-3 if isinstance(measure, AlphaBeta) else 2e-4
    exact = LossProblem(37, 1009, 24, 40, padding=5)
    single = exact.to(torch.float32)
    exact = single.to(torch.float64)
    for alpha, lam, order in itertools.product((-10.0, -5.0, -1.0, 0.999, 1.0, 1.01, 3.0, 10.0),
                                               (0.1, 0.9), ORDERS):
        objective = AMiD(alpha, lam, measure, order)
        truth = naive_loss((exact.student @ exact.weight.t())[:, :1009],
                           (exact.teacher @ exact.teacher_weight.t())[:, :1009], objective)
        expected = torch.autograd.grad((truth * exact.weights).sum(), [exact.student, exact.weight])
        out = linear_amid_loss(single.student, single.weight, single.teacher, single.teacher_weight,
                               objective, token_weights=single.weights, vocab_size=1009)
        actual = torch.autograd.grad(out.loss, [single.student, single.weight])
        valid = exact.weights > 0
        assert ((out.kd - truth).abs() / truth)[valid].max() < 2e-4, objective
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < budget, objective


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 128, 32, 64), (37, 1009, 24, 40), (130, 333, 17, 9)],
                         ids=str)
def test_low_precision_is_no_further_from_the_truth_than_the_naive_loss(dtype, shape):
    """The tolerance beyond the naive loss's own distance: 2⁻⁹, a unit of bf16's last place."""
    low = LossProblem(*shape).to(dtype)
    exact = low.to(torch.float64)
    for objective in (AMiD(-5.0, 0.1), AMiD(-1.0, 0.5, order={"pr": 0.5, "qr": 0.5}),
                      AMiD(3.0, 0.3, order="rq")):
        truth = exact.naive(objective)
        ours, naive = low.fused(objective).loss, low.naive(objective)
        assert (ours - truth).abs() <= (naive - truth).abs() + 2**-9 * truth.abs()
        for a, b, c in zip(low.gradients(ours), low.gradients(naive), exact.gradients(truth),
                           strict=True):
            assert relative_error(a, c) <= relative_error(b, c) + 2**-9


@pytest.mark.parametrize("alpha", [-10.0, -5.0, -1.0, 1 - 1e-6, 1.0, 1 + 1e-6, 3.0, 10.0])
@pytest.mark.parametrize("lam", [0.0, 1e-6, 0.1, 1 - 1e-6, 1.0])
def test_extreme_logits_stay_finite_and_right(alpha, lam):
    draw = torch.Generator().manual_seed(0)
    student, teacher = ((torch.rand(6, 50, generator=draw) * 2e4 - 1e4).round() for _ in range(2))
    student[0, 0], teacher[0, 0] = 1e4, 1e4  # agree on one id
    teacher[1] = student[1]  # agree on everything
    # Both are certain of the same id.
    student[2, 1:], teacher[2, 1:] = -1e4, -1e4
    student[2, 0], teacher[2, 0] = 1e4, 1e4
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    for order in ORDERS:
        objective = AMiD(alpha, lam, "kl", order)
        loss = amid_loss(student, teacher, objective)
        truth = naive_loss(exact, teacher.double(), objective)
        assert loss.isfinite().all()
        torch.testing.assert_close(loss, truth.float(), rtol=2e-4, atol=2e-3)
        actual, = torch.autograd.grad(loss.sum(), student)
        assert actual.isfinite().all()
        if truth.requires_grad:
            expected, = torch.autograd.grad(truth.sum(), exact)
            # Autograd through logaddexp of equal infinities may give NaN.
            if expected.isfinite().all():
                torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
def test_fp32_is_stable_as_alpha_approaches_one(step):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 200, generator=draw) * 3 for _ in range(2))
    for alpha, order in itertools.product((1 - step, 1 + step), ORDERS):
        objective = AMiD(alpha, 0.3, "kl", order)
        low, high = student.clone().requires_grad_(), student.double().requires_grad_()
        near = amid_loss(low, teacher, objective)
        truth = amid_loss(high, teacher.double(), objective)
        torch.testing.assert_close(near.double(), truth, rtol=2e-5, atol=1e-7)
        actual, expected = (torch.autograd.grad(x.sum(), y)[0]
                            for x, y in ((near, low), (truth, high)))
        assert relative_error(actual, expected) < 2e-5


# --- memory ---------------------------------------------------------------------------------------

class Seen(TorchDispatchMode):
    """Records each operation's name and input shapes, the largest tensor and the peak of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []
        self.largest = self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        self.calls.append((name, [tuple(x.shape) for x in arguments if isinstance(x, Tensor)]))
        inputs = {x.untyped_storage().data_ptr() for x in _tensors((arguments, keywords or {}))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs | self.storages:
                self._made(storage)
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.storages.add(pointer)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._freed, pointer, size)

    def _freed(self, pointer: int, size: int) -> None:
        self.storages.discard(pointer)
        self.live -= size


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


@pytest.fixture
def seen() -> Iterator[Seen]:
    threads = torch.get_num_threads()
    # A dispatch mode sees only its own thread.
    torch.set_num_threads(1)
    yield Seen()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_gradients_and_the_workspace_whatever_the_number_of_tokens(seen, dtype):
    workspace, vocabulary = 24_000_000, 4000
    problem = LossProblem(1500, vocabulary, 16, 16, dtype=dtype)
    with seen:
        problem.fused(AMiD(-5.0, 0.1), workspace_bytes=workspace).loss.backward()
    bytes_each = 4 if dtype == torch.float32 else 6
    gradients = sum(x.numel() for x in problem.leaves()) * bytes_each
    vectors = 1500 * 8 * 40
    assert seen.peak > gradients, "the meter does not see what it should"
    assert seen.peak <= gradients + workspace + vectors
    assert seen.largest < 1500 * vocabulary * problem.student.element_size() / 2


def test_sparse_targets_take_the_cross_entropys_products_and_hardly_more_memory(seen):
    problem = SparseProblem(8, tokens=120, vocabulary=9000, dtype=torch.float32)
    alone = type(seen)()
    with alone:
        linear_amid_loss(problem.student, LMHead(problem.weight, problem.bias), None, None, None,
                         token_weights=problem.weights, labels=problem.labels, ce_weight=0.4,
                         kd_weight=0.0, vocab_size=problem.vocab_size).loss.backward()
    problem.student.grad = problem.weight.grad = problem.bias.grad = None
    with seen:
        problem.sparse(AMiD(-5.0, 0.1)).loss.backward()
    assert seen.largest == alone.largest and seen.peak <= 1.05 * alone.peak
    products, expected = ([shapes for name, shapes in each.calls if name in ("mm", "addmm",
                                                                             "addmm_")]
                          for each in (seen, alone))
    assert products == expected and len(products) >= 3


def test_without_gradients_only_the_workspace_is_taken(seen):
    problem = LossProblem(1500, 4000, 64, 16, dtype=torch.float32)
    with seen, torch.no_grad():
        problem.fused(AMiD(-5.0, 0.1), workspace_bytes=20_000_000)
    assert seen.peak <= 20_000_000 + 1500 * 8 * 40


# --- bad input ------------------------------------------------------------------------------------

def call(**changes) -> fused.LossOutput:
    arguments = dict(student_hidden=torch.randn(5, 3), student_head=torch.randn(7, 3),
                     teacher_hidden=torch.randn(5, 4), teacher_head=torch.randn(7, 4),
                     objective=AMiD(), token_weights=torch.ones(5),
                     labels=torch.zeros(5, dtype=torch.long))
    return linear_amid_loss(**{**arguments, **changes})


@pytest.mark.parametrize(("changes", "message"), [
    ({"student_hidden": torch.randn(5, 2)}, r"\[5, 2\]"),
    ({"student_hidden": torch.randn(1, 5, 3)}, r"\[1, 5, 3\]"),
    ({"student_hidden": torch.zeros(5, 3, dtype=torch.long)}, "int64"),
    ({"student_hidden": torch.randn(5, 3).bfloat16()}, "bfloat16"),
    ({"student_hidden": None}, "NoneType"),
    ({"student_head": None}, "NoneType"),
    ({"student_head": torch.empty(0)}, r"\[0\]"),
    ({"student_head": LMHead(torch.randn(7, 3), torch.randn(6))}, r"bias \[6\]"),
    ({"teacher_hidden": torch.randn(6, 4)}, "6 of teacher"),
    ({"teacher_head": torch.randn(8, 4)}, "two widths"),
    ({"teacher_hidden": None}, "teacher_hidden missing"),
    ({"teacher_hidden": None, "teacher_head": None}, "kd_weight=1.0"),
    ({"teacher_hidden": None, "teacher_head": None, "kd_weight": 0.0, "labels": None}, "neither"),
    ({"objective": "kl"}, "type str"),
    ({"objective": None}, "NoneType"),
    ({"token_weights": torch.ones(4)}, r"token_weights of shape \[4\]"),
    ({"token_weights": torch.ones(5, dtype=torch.long)}, "token_weights of torch.int64"),
    ({"token_weights": torch.tensor([1., 1, -1, 1, 1])}, "-1.0"),
    ({"token_weights": torch.tensor([1., 1, float("nan"), 1, 1])}, "nan"),
    ({"token_weights": torch.tensor([1., 1, float("inf"), 1, 1])}, "inf"),
    ({"labels": torch.full((5,), 7)}, "labels such as 7"),
    ({"labels": torch.full((5,), -1)}, "labels such as -1"),
    ({"labels": torch.zeros(5)}, "float32"),
    ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels of shape \[4\]"),
    ({"labels": None, "ce_weight": 0.5}, "without labels"),
    ({"ce_weight": -1.0}, "ce_weight=-1.0"),
    ({"kd_weight": float("nan")}, "kd_weight=nan"),
    ({"vocab_size": 8}, "vocabulary of 8"),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"backend": "cuda"}, "'cuda'"),
    ({"workspace_bytes": 0}, "workspace_bytes=0"),
])
def test_a_bad_argument_is_refused_with_what_was_found_and_what_to_do(changes, message):
    with pytest.raises(InputError, match=message) as error:
        call(**changes)
    assert error.value.expected and error.value.remedy


@pytest.mark.parametrize(("student", "teacher", "options", "message"), [
    (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5), {}, "int64"),
    (torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int32), {}, "int32"),
    (torch.zeros(2, 5), torch.zeros(3, 5), {}, r"\[3, 5\]"),
    (torch.zeros(2, 5), torch.zeros(2, 6), {}, "two widths"),
    (torch.zeros(2, 5), torch.zeros(2, 6), {"vocab_size": 6}, "vocabulary of 6"),
    (torch.zeros(()), torch.zeros(()), {}, r"\[\]"),
    (torch.zeros(2, 0), torch.zeros(2, 0), {}, "vocabulary of 0"),
    (torch.zeros(2, 5), torch.zeros(2, 5), {"backend": "jax"}, "'jax'"),
])
def test_bad_logits_are_refused(student, teacher, options, message):
    with pytest.raises(InputError, match=message):
        amid_loss(student, teacher, AMiD(), **options)


def test_a_softcap_of_zero_is_refused():
    with pytest.raises(InputError, match="softcap=0"):
        LMHead(torch.zeros(3, 3), softcap=0.0)


def test_presets_run_fused():
    problem = LossProblem()
    for objective in (preset("skl"), preset("taid", t=0.3), preset("gkd", beta=0.2),
                      preset("abkd", alpha=0.5, beta=1)):
        torch.testing.assert_close(problem.fused(objective).loss, problem.naive(objective))
