"""The objective fused with both heads: hidden states in, loss and gradients out, never all logits.

Tokens are processed in blocks that fit a workspace of fixed size. A block's logits are made by two
matrix products, turned into the loss and, in place, into their own gradient (block.py), and two
more products add that gradient to those of the hidden states and the head. So the gradients are
made in the forward pass, with four products instead of the six of a recomputation; backward only
multiplies them by the scalar that arrives. The trade-off: a call that will be differentiated pays
for its gradients at once, and has no second derivative.

Memory beyond inputs and gradients: the workspace (`workspace_bytes`, by default
`blocks.default_workspace_bytes`; plain torch takes 25 MB of it on a CPU and 168 MB elsewhere for
other things than logits, and with less blocks are single tokens), a few vectors per token, and one
copy of the head's and of the hidden states' gradient in fp32 if these are of lower precision,
because sums over blocks are made in fp32 (the head's not if it is in bf16 and there is one block).
Masked tokens are dropped at the start. Collectives under a shard: at most three per block, of row
sums; one in backward, of the hidden states' gradient; and at the first call with a VocabShard
object one check, on a GPU also two about what all its ranks' devices can do.

The objective travels by argument: `linear_amid_loss` -> `LossInputs` -> `_LinearLoss` ->
`block.forward_backward_block` -> the backend's three functions -> `elementwise.mixture` or
`kernel_math.log_mixture`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import checks, elementwise
from amid_ds.losses.backends import choose_backend
from amid_ds.losses.block import (
    Backend,
    Block,
    Logits,
    arithmetic_dtype,
    forward_backward_block,
)
from amid_ds.losses.blocks import row_stride, tokens_per_block
from amid_ds.losses.checks import IGNORE_INDEX, VocabLayout
from amid_ds.losses.lm_head import HeadGradients, LMHead
from amid_ds.losses.objective import AMiD

# Rows that a CPU multiplies at once in backward: where the dtypes of the factors or of the result
# differ, it makes a temporary in the wider one. A GPU makes none.
BACKWARD_ROWS = 64


class LossOutput(NamedTuple):
    """A scalar loss that can be differentiated, and its parts per token.

    kd, ce: [N] fp32 (fp64 if an input is), detached, 0 for a masked token; None if not computed.
    """

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None


def amid_loss(
    student_logits: Tensor,            # [..., V_s] of any float dtype
    teacher_logits: Tensor,            # [..., V_t]
    objective: AMiD,
    *,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:                           # [...] fp32 (fp64 if an input is)
    """The objective per token, from logits (AMiD, arXiv 2510.15982). Replaces

        log_p = (teacher_logits.detach() / τ).log_softmax(-1)
        log_q = (student_logits / τ).log_softmax(-1)
        c = (1 - α) / 2
        log_r = (logaddexp(log(λ) + c * log_p, log(1 - λ) + c * log_q) / c).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_r)).sum(-1)

    for KL and the order `pr`; `reference.naive_loss` is that code for the whole family.

    vocab_size: only ids below it count, on both sides, renormalised; without it the two widths must
    be equal.
    shard: this rank's columns of both; every rank gets the whole loss, and its own columns'
    gradient.
    The gradient reaches student_logits alone, in their dtype.
    Collectives under a shard: at most three per block in forward, none in backward.
    Raises InputError (a ValueError) for shapes, dtypes and numbers that do not fit.
    """
    checks.check_logits(student_logits, teacher_logits, objective)
    student, teacher = (logits[None].flatten(0, -2)
                        for logits in (student_logits, teacher_logits.detach()))
    rows = {"student_logits": student.shape[1], "teacher_logits": teacher.shape[1]}
    layout = checks.check_vocabulary(rows, vocab_size, shard, student.shape[0], student.device)
    chosen = choose_backend(backend, objective, [student, teacher], layout.shard)
    size = _tokens_per_block(len(student), layout, [student, teacher], workspace_bytes, chosen)
    per_token: Tensor = _LogitLoss.apply(student, teacher, objective, layout, size, chosen,
                                         _wants_gradient(student))
    return per_token.reshape(student_logits.shape[:-1])


def linear_amid_loss(
    student_hidden: Tensor,            # [N, H_s]
    student_head: Tensor | LMHead,     # weight [V_local, H_s], or LMHead
    teacher_hidden: Tensor | None,     # [N, H_t]
    teacher_head: Tensor | LMHead | None,
    objective: AMiD | None,
    *,
    token_weights: Tensor,             # [N]; 0 masks a token
    labels: Tensor | None = None,      # [N] int, already shifted; -100: no cross entropy here
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    checked: bool = False,
) -> LossOutput:
    """Σ_i token_weights_i · (kd_weight · kd_i + ce_weight · ce_i), fused with both heads. Replaces

        student_logits = student_hidden @ W_s.T
        kd = amid_loss(student_logits, teacher_hidden @ W_t.T, objective)
        ce = F.cross_entropy(student_logits, labels, reduction="none")
        loss = (token_weights * (kd_weight * kd + ce_weight * ce)).sum()

    The cross entropy is of the untempered student logits.
    The gradient reaches student_hidden, weight and bias, in their dtypes; the teacher gets none,
    and token_weights count as constants.
    The logits' gradient is held in the inputs' dtype between the products, as autograd does: with
    fp16 keep token_weights large enough that it does not underflow, for a scale on the loss acts
    only after this gradient has been rounded.
    Plain training: with kd_weight=0 the teacher's hidden states and head may both be None (then so
    may the objective, which is not read, and kd is None).
    shard: both heads hold the rows [start, stop), and the hidden states, weights and labels are the
    same on every rank of the group; the hidden states' gradient comes back whole.
    checked: the values are known to be sound, no token is left out; else the host waits for a GPU.
    Collectives under a shard: at most three per block in forward, one in backward.
    Raises InputError (a ValueError) for shapes, dtypes and numbers that do not fit.
    """
    student = student_head if isinstance(student_head, LMHead) else LMHead(student_head)
    teacher = LMHead(teacher_head) if isinstance(teacher_head, Tensor) else teacher_head
    checks.check_linear(student_hidden, student, teacher_hidden, teacher, objective, token_weights,
                        labels, ce_weight, kd_weight)
    rows = {f"{side}_head": head.weight.shape[0]
            for side, head in (("student", student), ("teacher", teacher)) if head is not None}
    layout = checks.check_vocabulary(rows, vocab_size, shard, student_hidden.shape[0],
                                     student_hidden.device)
    # A narrow dtype may not hold IGNORE_INDEX, and torch indexes with int64.
    labels = None if labels is None else labels.long()
    if not checked:
        checks.check_values(token_weights, labels, layout.vocabulary)
    hidden = [x for x in (student_hidden, teacher_hidden) if x is not None]
    leaves = (student_hidden, student.weight, student.bias)
    inputs = LossInputs(
        teacher_hidden=teacher_hidden, student_head=student, teacher_head=teacher,
        objective=objective if teacher is not None else None, token_weights=token_weights,
        labels=labels, every_token=checked, ce_weight=float(ce_weight), kd_weight=float(kd_weight),
        layout=layout, backend=choose_backend(backend, objective, hidden, layout.shard),
        workspace_bytes=workspace_bytes, wants=tuple(map(_wants_gradient, leaves)))
    return LossOutput(*_LinearLoss.apply(*leaves, inputs))


@torch.no_grad()
def linear_argmax(
    hidden: Tensor,                    # [N, H]
    head: LMHead,                      # weight [V_local, H]
    *,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:                           # [N] int64
    """A model's first choice: the id with the highest logit, the lowest among equals. Replaces

        (hidden @ W.T + b)[:, :vocab_size].argmax(-1)

    A scale is taken to be above 0, so neither it nor a soft cap changes the order.
    Blocks of tokens as in the loss, the same answer on every rank of a shard's group.
    Collectives under a shard: one per block. Raises InputError for arguments that do not fit.
    """
    checks.check_head_and_hidden("the", hidden, head)
    device, dtype = hidden.device, head.weight.dtype
    layout = checks.check_vocabulary({"head": head.weight.shape[0]}, vocab_size, shard,
                                     hidden.shape[0], device)
    size = _tokens_per_block(len(hidden), layout, [head.weight], workspace_bytes, elementwise)
    chosen = torch.empty(len(hidden), dtype=torch.int64, device=device)
    workspace = _logits_workspace(min(size, len(hidden)), layout, dtype, device)
    for rows in _blocks(len(hidden), size):
        raw = head.logits(hidden[rows], layout.valid, workspace).raw
        # The best logit and its id; a shard may be empty.
        best = torch.full((2, len(raw)), -torch.inf, dtype=torch.float64, device=device)
        if layout.valid:
            peak, index = raw.max(-1)
            best = torch.stack([peak.double(), (index + layout.shard.start).double()])
        shards = layout.shard.gather(best)
        first = shards[:, 0].argmax(0)
        chosen[rows] = shards[first, 1, torch.arange(len(raw), device=device)].long()
    return chosen


@dataclass(frozen=True)
class LossInputs:
    """A call of the linear loss, but for the three tensors that may get a gradient."""

    teacher_hidden: Tensor | None
    student_head: LMHead
    teacher_head: LMHead | None
    # None exactly if there is no teacher.
    objective: AMiD | None
    token_weights: Tensor
    labels: Tensor | None
    every_token: bool
    ce_weight: float
    kd_weight: float
    layout: VocabLayout
    backend: Backend
    workspace_bytes: int | None
    # True for each of hidden, weight and bias that gets a gradient.
    wants: tuple[bool, ...]


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, objective: AMiD, layout: VocabLayout,
                size: int, backend: Backend, wants_gradient: bool) -> Tensor:
        dtype = arithmetic_dtype(student, teacher)
        tokens, valid = student.shape[0], layout.valid
        student = student.detach()
        per_token = torch.empty(tokens, dtype=dtype, device=student.device)
        gradient = kd_scale = None
        if wants_gradient:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
            gradient[:, valid:] = 0
            kd_scale = torch.ones_like(per_token)
        for rows in _blocks(tokens, size):
            block = Block(Logits(student[rows, :valid]), Logits(teacher[rows, :valid]), objective,
                          dtype,
                          kd_scale=None if kd_scale is None else kd_scale[rows],
                          gradient=None if gradient is None else gradient[rows, :valid])
            kd, _ = forward_backward_block(block, layout.shard, backend)
            assert kd is not None
            per_token[rows] = kd
        ctx.gradients = [gradient]
        return per_token

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, = _take_gradients(ctx)
        assert gradient is not None
        return (_scaled(gradient, upstream, gradient.dtype), *[None] * 6)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                inputs: LossInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            loss, kd, ce, gradients = _loss_and_gradients(hidden, inputs)
        ctx.gradients, ctx.shard = gradients, inputs.layout.shard
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*[x for x in (kd, ce) if x is not None])
        ctx.set_materialize_grads(False)
        return loss, kd, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None,
                 *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _take_gradients(ctx)
        if upstream is None:
            return (None,) * 4
        hidden, *of_head = gradients
        if hidden is not None:
            hidden = _scaled(hidden, upstream, hidden.dtype)
            # Before it is rounded.
            ctx.shard.add_up(hidden)
            hidden = hidden.to(ctx.dtypes[0])
        return (hidden, *[None if gradient is None else _scaled(gradient, upstream, dtype)
                          for gradient, dtype in zip(of_head, ctx.dtypes[1:], strict=True)], None)


def _take_gradients(ctx: Any) -> list[Tensor | None]:
    """The gradients that forward left, to be scaled in place; copies if the graph is kept."""
    # Gradients are enabled within a backward only under create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError("the fused loss has no second derivative: its gradients are made in "
                           "forward, as numbers; call backward without create_graph=True")
    if ctx.gradients is None:
        raise RuntimeError("backward was called a second time on the fused loss, whose gradients "
                           "have been given away; call the loss again, or the first backward with "
                           "retain_graph=True")
    # retain_graph=True: backward may come again.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if gradient is None else gradient.clone() for gradient in ctx.gradients]
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor, rounded to `dtype` in the same pass; in place if that is its dtype.

    factor: a scalar, or one entry per row [n].
    """
    result = gradient if dtype == gradient.dtype else torch.empty_like(gradient, dtype=dtype)
    at_once = gradient.device.type != "cpu" or gradient.dtype == factor.dtype == dtype
    per_row = factor.dim() > 0
    # A tensor without dimensions would be rounded to the gradient's dtype first.
    factor = factor.reshape(-1, *[1] * (gradient.dim() - 1))
    for rows in _blocks(len(gradient), len(gradient) if at_once else BACKWARD_ROWS):
        torch.mul(gradient[rows], factor[rows] if per_row else factor, out=result[rows])
    return result


def _loss_and_gradients(hidden: Tensor, inputs: LossInputs) -> tuple[
        Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
    """(loss, kd [N], ce [N], [∂loss/∂hidden, ∂loss/∂weight, ∂loss/∂bias]), arithmetic's dtype."""
    layout, dtype = inputs.layout, arithmetic_dtype(hidden, inputs.teacher_hidden)
    weights = inputs.token_weights.to(dtype)
    kd = None if inputs.objective is None else torch.zeros_like(weights)
    ce = None if inputs.labels is None else torch.zeros_like(weights)
    heads = [head for head in (inputs.student_head, inputs.teacher_head) if head is not None]
    index: Tensor | range = range(len(weights))
    if not inputs.every_token:
        index = weights.nonzero()[:, 0]
    size = _tokens_per_block(len(index), layout, [head.weight for head in heads],
                             inputs.workspace_bytes, inputs.backend, hidden.shape[1])
    gradients = HeadGradients(hidden, inputs.student_head, layout.valid, dtype, inputs.wants,
                              single_block=len(index) <= size)
    workspaces = [_logits_workspace(min(size, len(index)), layout, head.weight.dtype, hidden.device)
                  for head in heads]
    for rows in _blocks(len(index), size):
        tokens = rows if isinstance(index, range) else index[rows]
        block_hidden = hidden[tokens]
        block = _make_block(block_hidden, inputs, tokens, weights[tokens], workspaces, dtype)
        block_kd, block_ce = forward_backward_block(block, layout.shard, inputs.backend)
        if kd is not None and block_kd is not None:
            kd[tokens] = block_kd
        if ce is not None and block_ce is not None:
            ce[tokens] = block_ce
        if block.gradient is not None:
            gradients.add(block.gradient, block_hidden, tokens)
    loss = weights.new_zeros(())
    for weight, values in ((inputs.kd_weight, kd), (inputs.ce_weight, ce)):
        if values is not None and weight:
            loss = loss + weight * torch.dot(weights, values)
    return loss, kd, ce, gradients.totals()


def _make_block(hidden: Tensor, inputs: LossInputs, tokens: Tensor | slice, weights: Tensor,
                workspaces: list[Tensor], dtype: torch.dtype) -> Block:
    """The block of n `tokens` with student hidden states [n, H_s], its logits in `workspaces`."""
    layout, wants_gradient = inputs.layout, any(inputs.wants)
    student = inputs.student_head.logits(hidden, layout.valid, workspaces[0])
    teacher = labels = kd_scale = ce_scale = None
    if inputs.teacher_head is not None and inputs.teacher_hidden is not None:
        teacher = inputs.teacher_head.logits(inputs.teacher_hidden[tokens], layout.valid,
                                             workspaces[1])
        if wants_gradient and inputs.kd_weight:
            kd_scale = weights * inputs.kd_weight
    if inputs.labels is not None:
        ids = inputs.labels[tokens]
        labelled = ids != IGNORE_INDEX
        labels = torch.where(labelled, ids - layout.shard.start, -1)
        if wants_gradient and inputs.ce_weight:
            ce_scale = weights * inputs.ce_weight * labelled
    return Block(student, teacher, inputs.objective, dtype, labels, kd_scale, ce_scale,
                 student.raw if wants_gradient else None)


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _blocks(tokens: int, size: int) -> Iterator[slice]:
    """Blocks of `size` tokens, the last maybe shorter."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size)))


def _logits_workspace(tokens: int, layout: VocabLayout, dtype: torch.dtype,
                      device: torch.device) -> Tensor:
    """Room for the logits of `tokens` tokens (LMHead.logits)."""
    return torch.empty(tokens * row_stride(layout.valid, device.type), dtype=dtype, device=device)


def _tokens_per_block(tokens: int, layout: VocabLayout, models: list[Tensor],
                      workspace_bytes: int | None, backend: Backend, hidden_size: int = 1) -> int:
    """The length of the blocks of `tokens` tokens; the last may be shorter.

    The same on all ranks of a group. models: a tensor of each model's dtype.
    """
    token_bytes = sum(model.element_size() for model in models)
    return tokens_per_block(tokens, layout, hidden_size, token_bytes, workspace_bytes,
                            models[0].device, tiled=backend is elementwise)
