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
sums, and one more for measures of the tokens (block.py); one in backward, of the hidden states'
gradient; and at the first call with a VocabShard object one check, on a GPU also two about what all
its ranks' devices can do.

Where the tokens of a sequence decide something together (a token weight by `top`, a measure over
the sequence), all blocks are measured first, and their logits made a second time for the loss: six
products instead of four.

The objective travels by argument: `linear_amid_loss` -> `LossInputs` -> `FusedLoss` ->
`block.forward_backward_block` -> the backend's functions -> `mixture.mixture` or
`kernel_math.log_mixture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import checks, elementwise
from amid_ds.losses.backends import choose_backend
from amid_ds.losses.block import (
    Backend,
    Block,
    BlockLoss,
    Logits,
    arithmetic_dtype,
    forward_backward_block,
    measure,
    row_normalisers,
    weighted_part,
)
from amid_ds.losses.blocks import slices, tokens_per_block
from amid_ds.losses.checks import VocabLayout
from amid_ds.losses.lm_head import (
    HeadGradients,
    LMHead,
    logits_workspace,
    scaled,
    take_gradients,
)
from amid_ds.losses.loss_inputs import LossInputs, make_block
from amid_ds.losses.measures import PerToken
from amid_ds.losses.objective import AMiD
from amid_ds.losses.sparse import SparseTargets
from amid_ds.losses.sparse_block import forward_backward_targets, measure_targets, spread_width
from amid_ds.losses.sparse_checks import check_targets
from amid_ds.losses.summed_head import AnyHead


class LossOutput(NamedTuple):
    """A scalar loss that can be differentiated, and its parts per token.

    kd, ce: [N] fp32 (fp64 if an input is), detached, 0 for a masked token; None if not computed.
    The objective's `token_weight` is in the loss and not in these.
    statistics: the same of each statistic that was asked for, by its name.
    """

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    statistics: dict[str, Tensor]


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

    for KL and the order `pr`; `reference.naive_loss` is that code for the whole family. Times the
    objective's `token_weight`, if it has one.

    vocab_size: only ids below it count, on both sides, renormalised; without it the two widths must
    be equal.
    shard: this rank's columns of both; every rank gets the whole loss, and its own columns'
    gradient.
    The gradient reaches student_logits alone, in their dtype.
    Collectives under a shard: at most three per block in forward, one more if a number of the
    objective is per token; none in backward.
    Raises InputError (a ValueError) for shapes, dtypes and numbers that do not fit, and for an
    objective that reads labels or sequences.
    """
    checks.check_logits(student_logits, teacher_logits, objective)
    student, teacher = (logits[None].flatten(0, -2)
                        for logits in (student_logits, teacher_logits.detach()))
    rows = {"student_logits": student.shape[1], "teacher_logits": teacher.shape[1]}
    layout = checks.check_vocabulary(rows, vocab_size, shard, student.shape[0], student.device)
    chosen = choose_backend(backend, objective, [student, teacher], layout.shard)
    size = _tokens_per_block(len(student), layout, [student, teacher], workspace_bytes, chosen)
    per_token: Tensor = _LogitLoss.apply(student, teacher, objective, layout, size, chosen,
                                         gets_gradient(student))
    return per_token.reshape(student_logits.shape[:-1])


def linear_amid_loss(
    student_hidden: Tensor,            # [N, H_s]
    student_head: Tensor | LMHead,     # weight [V_local, H_s], or LMHead
    teacher_hidden: Tensor | None,     # [N, H_t]
    teacher_head: Tensor | AnyHead | None,
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
    sequences: Tensor | None = None,   # [N] int: which sequence a token is of
    statistics: Sequence[str] = (),
    targets: SparseTargets | None = None,  # of N tokens, in the teacher's place
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
    sequences: read, and required, where the objective's numbers follow from a whole sequence. A
    token's weight is then also multiplied by the objective's `token_weight`.
    statistics: names of measures.STATISTICS, reported per token.
    targets: the teacher's distributions, written down sparsely (sparse.SparseTargets), in the place
    of its hidden states and head; for about the price of the cross entropy.
    Collectives under a shard: at most three per block in forward, one more with a measure that the
    objective or the statistics name, one more with `agreement`, one more if the objective needs
    sequences; with targets one per block, one more with `agreement`, and both again if the
    objective needs sequences (under `spread` as with a teacher, and one more where
    `label_probability` is asked for among others); one in backward.
    Raises InputError (a ValueError) for shapes, dtypes and numbers that do not fit.
    """
    student = student_head if isinstance(student_head, LMHead) else LMHead(student_head)
    teacher = LMHead(teacher_head) if isinstance(teacher_head, Tensor) else teacher_head
    checks.check_linear(student_hidden, student, teacher_hidden, teacher, objective, token_weights,
                        labels, ce_weight, kd_weight, has_targets=targets is not None)
    if teacher is None and targets is None:
        objective = None
    checks.check_measures(objective, len(student_hidden), labels, sequences, statistics)
    rows = {f"{side}_head": head.rows
            for side, head in (("student", student), ("teacher", teacher)) if head is not None}
    layout = checks.check_vocabulary(rows, vocab_size, shard, student_hidden.shape[0],
                                     student_hidden.device)
    # A narrow dtype may not hold IGNORE_INDEX, and torch indexes with int64.
    labels = None if labels is None else labels.long()
    if not checked:
        checks.check_values(token_weights, labels, layout.vocabulary)
    if targets is not None:
        assert objective is not None
        check_targets(targets, objective, token_weights, layout.vocabulary, statistics,
                      by_value=not checked)
    hidden = [x for x in (student_hidden, teacher_hidden) if x is not None]
    leaves = (student_hidden, student.weight, student.bias)
    inputs = LossInputs(
        teacher_hidden=teacher_hidden, student_head=student, teacher_head=teacher,
        targets=targets, objective=objective, token_weights=token_weights,
        labels=labels, every_token=checked, ce_weight=float(ce_weight), kd_weight=float(kd_weight),
        layout=layout, backend=choose_backend(backend, objective, hidden, layout.shard),
        workspace_bytes=workspace_bytes, wants=tuple(map(gets_gradient, leaves)),
        sequences=sequences, statistics=tuple(dict.fromkeys(statistics)))
    compute = partial(_loss_and_gradients, inputs=inputs)
    loss, kd, ce, *measured = FusedLoss.apply(*leaves, compute, layout.shard)
    return LossOutput(loss, kd, ce, dict(zip(inputs.statistics, measured, strict=True)))


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
        for rows in slices(tokens, size):
            block = Block(
                Logits(student[rows, :valid], temperature=objective.student_temperature),
                Logits(teacher[rows, :valid], temperature=objective.teacher_temperature), None,
                dtype, kd_scale=None if kd_scale is None else kd_scale[rows],
                gradient=None if gradient is None else gradient[rows, :valid])
            out = forward_backward_block(block, objective, layout.shard, backend)
            assert out.kd is not None
            per_token[rows] = out.kd if out.factor is None else weighted_part(out.factor, out.kd)
        ctx.gradients = [gradient]
        return per_token

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, = take_gradients(ctx)
        assert gradient is not None
        return (scaled(gradient, upstream, gradient.dtype), *[None] * 6)


class FusedLoss(torch.autograd.Function):
    """(loss, kd, ce, *statistics) of the student's hidden states [N, H], weight and bias.

    compute: from the hidden states to the loss and its gradients by the three, in the arithmetic's
    dtype. One collective in backward, over the shard.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                compute: Callable[[Tensor], tuple[LossOutput, list[Tensor | None]]],
                shard: VocabShard) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            out, ctx.gradients = compute(hidden)
        ctx.shard = shard
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        parts = (out.kd, out.ce, *out.statistics.values())
        ctx.mark_non_differentiable(*[x for x in parts if x is not None])
        ctx.set_materialize_grads(False)
        return out.loss, *parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None,
                 *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = take_gradients(ctx)
        if upstream is None:
            return (None,) * 5
        hidden, *of_head = gradients
        if hidden is not None:
            hidden = scaled(hidden, upstream, hidden.dtype)
            # Before it is rounded.
            ctx.shard.add_up(hidden)
            hidden = hidden.to(ctx.dtypes[0])
        return (hidden, *[None if gradient is None else scaled(gradient, upstream, dtype)
                          for gradient, dtype in zip(of_head, ctx.dtypes[1:], strict=True)],
                None, None)


def _loss_and_gradients(hidden: Tensor,
                        inputs: LossInputs) -> tuple[LossOutput, list[Tensor | None]]:
    """(the loss, [∂loss/∂hidden, ∂loss/∂weight, ∂loss/∂bias]), in the arithmetic's dtype."""
    layout, dtype = inputs.layout, arithmetic_dtype(hidden, inputs.teacher_hidden)
    weights = inputs.token_weights.to(dtype)
    kd = None if inputs.objective is None else torch.zeros_like(weights)
    ce = None if inputs.labels is None else torch.zeros_like(weights)
    statistics = {name: torch.zeros_like(weights) for name in inputs.statistics}
    models = inputs.workspaces(dtype)
    index: Tensor | range = range(len(weights))
    if not inputs.every_token:
        index = weights.nonzero()[:, 0]
    size = _tokens_per_block(len(index), layout, models, inputs.workspace_bytes,
                             inputs.backend, hidden.shape[1])
    gradients = HeadGradients(hidden, inputs.student_head, layout.valid, dtype, inputs.wants,
                              single_block=len(index) <= size)
    width = spread_width(layout) if inputs.spread else layout.valid
    workspaces = [logits_workspace(min(size, len(index)), width, model) for model in models]

    def blocks() -> Iterator[tuple[Tensor | slice, Block]]:
        for rows in slices(len(index), size):
            tokens = rows if isinstance(index, range) else index[rows]
            yield tokens, make_block(hidden, inputs, tokens, weights[tokens], workspaces, dtype)

    values, in_blocks = None, inputs.statistics
    if inputs.objective is not None and inputs.objective.needs_sequences:
        statistics, values = _measured_first(blocks(), inputs, weights)
        in_blocks = ()
    total_weights = weights
    if inputs.objective is not None and inputs.objective.token_weight is not None:
        total_weights = torch.zeros_like(weights)
    for tokens, block in blocks():
        out = _block_loss(
            block, tokens, inputs, in_blocks,
            None if values is None else {each: of[tokens] for each, of in values.items()})
        parts = [(kd, out.kd), (ce, out.ce),
                 *((statistics[name], out.statistics[name]) for name in in_blocks)]
        for whole, part in parts:
            if whole is not None and part is not None:
                whole[tokens] = part
        if out.factor is not None:
            total_weights[tokens] = weights[tokens] * out.factor
        if block.gradient is not None:
            gradients.add(block.gradient, hidden[tokens], tokens)
    loss = weights.new_zeros(())
    for weight, part in ((inputs.kd_weight, kd), (inputs.ce_weight, ce)):
        if part is not None and weight:
            loss = loss + weight * (torch.dot(weights, part) if total_weights is weights
                                    else weighted_part(total_weights, part).sum())
    return LossOutput(loss, kd, ce, statistics), gradients.totals()


def _block_loss(block: Block, tokens: Tensor | slice, inputs: LossInputs,
                statistics: tuple[str, ...],
                values: Mapping[PerToken, Tensor] | None) -> BlockLoss:
    rows = inputs.targets_at(tokens)
    if rows is None:
        return forward_backward_block(block, inputs.objective, inputs.layout.shard, inputs.backend,
                                      statistics, values)
    assert inputs.objective is not None
    return forward_backward_targets(block, rows, inputs.objective, inputs.backend, statistics,
                                    values)


def _measured_first(blocks: Iterator[tuple[Tensor | slice, Block]], inputs: LossInputs,
                    weights: Tensor) -> tuple[dict[str, Tensor], dict[PerToken, Tensor]]:
    """The statistics, and the values of all the objective's `per_token`, [N] each; from the
    measures of all blocks."""
    objective, shard = inputs.objective, inputs.layout.shard
    assert objective is not None and inputs.sequences is not None
    measured = {name: torch.zeros_like(weights) for name in
                (*inputs.statistics, *objective.measures)}
    for tokens, block in blocks:
        rows = inputs.targets_at(tokens)
        if rows is None:
            norms, _ = row_normalisers(block, shard, inputs.backend)
            parts = measure(block, norms, shard, inputs.backend, set(measured))
        else:
            parts = measure_targets(block, rows, objective, inputs.backend, set(measured))
        for name, part in parts.items():
            measured[name][tokens] = part
    values = {each: each.values_in_sequences(measured[each.by], inputs.sequences, weights > 0)
              if each.needs_sequences else each.values(measured[each.by])
              for each in objective.per_token}
    return {name: measured[name] for name in inputs.statistics}, values


def gets_gradient(tensor: Tensor | None) -> bool:
    """True where autograd asks for one."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _tokens_per_block(tokens: int, layout: VocabLayout, models: list[Tensor],
                      workspace_bytes: int | None, backend: Backend, hidden_size: int = 1) -> int:
    """The length of the blocks of `tokens` tokens; the last may be shorter.

    The same on all ranks of a group. models: a tensor of each model's dtype.
    """
    token_bytes = sum(model.element_size() for model in models)
    return tokens_per_block(tokens, layout, hidden_size, token_bytes, workspace_bytes,
                            models[0].device, tiled=backend is elementwise)
