"""One block of tokens against sparse targets: the cross entropy's two readings, and O(n K) beside.

The student's logits at the K ids (and at the label) are taken out of the block, where -inf stands
in for them; one reading and one exchange then give the log-sum-exp of all the others, to all its
digits: nothing is 1 - Σ. K + 1 classes are left, the ids and everything else, an ordinary
vocabulary on which block.py computes the loss and its gradient G, the same on every rank. By the
chain rule an id's logit has its own column of G, and any other one G_rest · exp(s - log-sum-exp):
a cross entropy's gradient with another factor, which is the second reading. Into its zeros at the
ids their own columns are added.

A soft cap makes a finite logit, -cap, of -inf: what so many of them add is subtracted from the sum
(V - K others are at least -cap too, so this costs no digits unless nearly all ids are kept), and
there the slope of the cap is 0.

`spread` has a p of V ids: its logits are written into a second workspace, for block.py itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard, merge_logsumexp
from amid_ds.losses.block import (
    Backend,
    Block,
    BlockLoss,
    Logits,
    RowNormalisers,
    cross_entropy,
    forward_backward_block,
    measure,
    row_normalisers,
)
from amid_ds.losses.blocks import row_stride
from amid_ds.losses.checks import VocabLayout
from amid_ds.losses.divergences import INFINITE_RATIO, LOG_ZERO
from amid_ds.losses.measures import PerToken, first_choices
from amid_ds.losses.objective import AMiD
from amid_ds.losses.sparse import SparseTargets

# The classes of a block are whole on every rank: nothing about them is exchanged.
_LOCAL = VocabShard(0, 0)


@dataclass(frozen=True)
class BlockTargets:
    """What a block of n tokens has in a teacher's place."""

    # Of the block's tokens.
    targets: SparseTargets
    # [n] int64 ids of the whole vocabulary, negative for a token without one.
    labels: Tensor | None
    layout: VocabLayout

    @property
    def ids(self) -> Tensor:
        """[n, K] the ids that count, -1 for the others."""
        return self.targets.ids.where(self.targets.ids < self.layout.vocabulary, -1)

    def on_shard(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(this rank's column of each id, 0 where another has it; True where this one has it)."""
        columns = ids - self.layout.shard.start
        held = (ids >= 0) & (columns >= 0) & (columns < self.layout.valid)
        return columns.where(held, 0), held


@dataclass(frozen=True)
class _Classes:
    """A block without the columns that were taken out of it: the same on every rank, but for the
    places."""

    # [n, M] the ids taken out: the K, and the label unless it is one of them; -1 for none.
    ids: Tensor
    # [n, M] their columns on this shard, and where it holds them.
    columns: Tensor
    held: Tensor
    # [n, M] their untempered logits, at least LOG_ZERO; -inf for none.
    logits: Tensor
    # [2, n] log Σ exp of the tempered logits of all but the K ids; (0, 0) if it is -inf.
    rest: Tensor
    # [2, n] log Σ exp of all untempered logits; None without labels.
    log_z: Tensor | None
    # The K ids and everything else as a vocabulary of its own, without labels.
    block: Block
    # What had to be measured before the columns were taken out.
    measured: dict[str, Tensor]


def forward_backward_targets(block: Block, rows: BlockTargets, objective: AMiD, backend: Backend,
                             statistics: tuple[str, ...] = (),
                             values: Mapping[PerToken, Tensor] | None = None) -> BlockLoss:
    """`block.forward_backward_block` against sparse targets. The block's teacher is that of
    `spread_logits` under `spread`, None otherwise; then the student's logits are written over.

    Collectives under a shard: one, and one more for `agreement`; under `spread` those of a teacher,
    and one more where `label_probability` is asked for among others.
    """
    shard = rows.layout.shard
    asked = {*statistics, *(objective.measures if values is None else ())}
    if rows.targets.rest == "spread" and "label_probability" not in asked:
        return forward_backward_block(block, objective, shard, backend, statistics, values)
    classes = None if block.teacher is not None else _take_out(block, rows, objective, backend,
                                                               asked)
    measured = _measures(classes, block, rows, backend, asked)
    if values is None:
        values = {each: each.values(measured[each.by]) for each in objective.per_token}
    if classes is None:
        out = forward_backward_block(block, objective, shard, backend, (), values)
    elif rows.targets.sampled:
        out = _sampled_loss(classes.block, rows, objective, values)
    else:
        out = forward_backward_block(classes.block, objective, _LOCAL, backend, (), values)
    if classes is not None:
        block = block if out.factor is None else block.weighted(out.factor)
        if block.gradient is not None:
            _write_gradient(block, rows, classes, backend)
        if rows.labels is not None:
            assert classes.log_z is not None
            of_label = (classes.ids == rows.labels[:, None]) & (classes.ids >= 0)
            logits = classes.logits.where(of_label, -torch.inf).amax(1)
            out = out._replace(ce=cross_entropy(logits, classes.log_z))
    return out._replace(statistics={name: measured[name] for name in statistics})


def measure_targets(block: Block, rows: BlockTargets, objective: AMiD, backend: Backend,
                    names: set[str]) -> dict[str, Tensor]:
    """The measures [n] of these names, of a block as `forward_backward_targets` takes it. At most
    three collectives."""
    classes = None if block.teacher is not None else _take_out(block, rows, objective, backend,
                                                               names)
    return _measures(classes, block, rows, backend, names)


def spread_width(layout: VocabLayout) -> int:
    """Columns of the workspace of `spread_logits`: the last takes what another shard holds."""
    return layout.valid + 1


def spread_logits(rows: BlockTargets, workspace: Tensor) -> Tensor:
    """[n, width] log p of this shard's columns under `spread`, made in `workspace`, a flat buffer
    for n rows of `spread_width` columns.

    Of a row that keeps every id nothing is left, whatever log_rest says.
    """
    ids, layout, targets = rows.ids, rows.layout, rows.targets
    assert targets.log_rest is not None
    stride = row_stride(spread_width(layout), workspace.device.type)
    raw = workspace[:len(ids) * stride].view(len(ids), stride)
    others = (layout.vocabulary - (ids >= 0).sum(1)).to(raw.dtype)
    # No number where every id is kept, and all of them are written over.
    raw[:] = (targets.log_rest.to(raw.dtype) - others.log())[:, None]
    columns, held = rows.on_shard(ids)
    raw.scatter_(1, columns.where(held, layout.valid), targets.log_probabilities.to(raw.dtype))
    return raw[:, :layout.valid]


def _take_out(block: Block, rows: BlockTargets, objective: AMiD, backend: Backend,
              asked: set[str]) -> _Classes:
    """Put -inf in the place of the block's logits at the ids and at the labels. One collective, one
    more for agreement."""
    shard, student, dtype = rows.layout.shard, block.student, block.dtype
    ids = kept = rows.ids
    count = ids.shape[1]
    measured = _agreement(block, rows) if "agreement" in asked else {}
    if rows.labels is not None:
        # A label that is among the ids is none of its own.
        known = (ids == rows.labels[:, None]).any(1)
        ids = torch.cat([ids, rows.labels.masked_fill(known, -1).clamp(min=-1)[:, None]], 1)
    columns, held = rows.on_shard(ids)
    local = torch.full(ids.shape, -torch.inf, dtype=dtype, device=block.device)
    if student.width:
        raw = student.raw.gather(1, columns).to(dtype)
        local = student.scale_and_cap(raw).clamp(min=LOG_ZERO).where(held, -torch.inf)
        gone = -math.copysign(math.inf, student.scale)
        student.raw.scatter_add_(1, columns, torch.zeros_like(held, dtype=student.raw.dtype)
                                 .masked_fill_(held, gone))
    tau = student.temperature
    heads = [_tempered(student)]
    if rows.labels is not None and tau != 1:
        heads.append(replace(student, temperature=1.0))
    pairs = torch.stack([_log_sum_of_others(block, head, held, backend) for head in heads])
    parts = shard.gather(torch.cat([pairs.flatten(0, 1), local.t()]))
    pairs = merge_logsumexp(parts[:, :2 * len(heads)].unflatten(1, (-1, 2)))
    logits = parts[:, 2 * len(heads):].amax(0).t()
    log_z = None if rows.labels is None else _with_columns(pairs[-1], logits)
    rest = _with_columns(pairs[0], logits[:, count:] / tau)
    top = torch.maximum(logits[:, :count].amax(1) / tau if count else rest[0], rest[0])
    of_student = torch.cat([logits[:, :count] / tau - top[:, None],
                            ((rest[0] - top) + rest[1])[:, None]], 1)
    coarse = Block(
        Logits(of_student),
        Logits(_teacher_classes(rows, kept, dtype), temperature=objective.teacher_temperature),
        None, dtype, kd_scale=block.kd_scale,
        gradient=None if block.kd_scale is None else torch.empty_like(of_student))
    rest = rest.masked_fill(rest.sum(0) <= LOG_ZERO, 0.0)
    return _Classes(ids, columns, held, logits, rest, log_z, coarse, measured)


def _teacher_classes(rows: BlockTargets, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, K + 1] log p of the kept ids, and of everything else, which is nothing under `drop` and
    where every id is kept."""
    targets = rows.targets
    of_ids = targets.log_probabilities.to(dtype).where(kept >= 0, -torch.inf)
    rest = torch.full_like(of_ids[:, 0], -torch.inf)
    if targets.rest == "ghost":
        assert targets.log_rest is not None
        everything = (kept >= 0).sum(1) >= rows.layout.vocabulary
        rest = targets.log_rest.to(dtype).masked_fill(everything, -torch.inf)
    return torch.cat([of_ids, rest[:, None]], 1)


def _tempered(student: Logits) -> Logits:
    """The tempered logits as those of a head: scale and cap over τ, at temperature 1."""
    tau, cap = student.temperature, student.softcap
    if tau == 1:
        return student
    return Logits(student.raw, student.scale / tau, None if cap is None else cap / tau)


def _log_sum_of_others(block: Block, student: Logits, held: Tensor, backend: Backend) -> Tensor:
    """[2, n] log Σ exp of this shard's logits but for those taken out."""
    # Labels are what makes a block without a teacher sum its logits.
    none = torch.full((block.tokens,), -1, dtype=torch.int64, device=block.device)
    peak, rest = backend.log_normalisers(Block(student, None, None, block.dtype, none))[0]
    if student.softcap is None:
        return torch.stack([peak, rest])
    gone = held.sum(1)
    others, each = student.width - gone, (-student.softcap - peak).exp()
    # No other logit is below -cap.
    total = torch.maximum(rest.exp() - gone * each, others * each)
    return torch.stack([peak, total.log().masked_fill(others == 0, -torch.inf)])


def _with_columns(pair: Tensor, logits: Tensor) -> Tensor:
    """A log-sum-exp [2, n] with some logits [n, m] added."""
    peak = torch.maximum(pair[0], logits.amax(1)) if logits.shape[1] else pair[0]
    added = (logits - peak[:, None]).exp().sum(1)
    return torch.stack([peak, ((pair[0] - peak + pair[1]).exp() + added).log()])


def _agreement(block: Block, rows: BlockTargets) -> dict[str, Tensor]:
    """Where the student's first choice is the teacher's, the first of the most probable ids. One
    collective."""
    ids, peaks = first_choices([block.student.raw], rows.layout.shard)
    kept = rows.ids
    first = rows.targets.log_probabilities.where(kept >= 0, -torch.inf).argmax(1)
    agree = (kept.gather(1, first[:, None])[:, 0] == ids[0]).to(block.dtype)
    return {"agreement": agree.where(~peaks[0].isnan(), torch.nan)}


def _measures(classes: _Classes | None, block: Block, rows: BlockTargets, backend: Backend,
              names: set[str]) -> dict[str, Tensor]:
    """The measures of these names: of the classes, or of a block with a teacher. The teacher's p of
    the label is its own, whatever p is outside the ids; tempered, that of the label's class."""
    found = {} if classes is None else dict(classes.measured)
    measured, shard = (block, rows.layout.shard) if classes is None else (classes.block, _LOCAL)
    assert measured.teacher is not None
    if "label_probability" in names:
        assert rows.labels is not None
        exact = rows.targets.label_log_probabilities
        if measured.teacher.temperature == 1:
            assert exact is not None
            p = exact.to(block.dtype).exp()
            found["label_probability"] = p.masked_fill(rows.labels < 0, 0.0)
        elif classes is not None:
            of_label = (rows.ids == rows.labels[:, None]) & (rows.labels >= 0)[:, None]
            place = of_label.int().argmax(1).where(of_label.any(1), -1)
            measured = replace(measured, labels=place)
    if rows.targets.sampled:
        return {**found, **_sampled_measures(measured, rows, names)}
    others = names - {*found}
    if others:
        norms, _ = row_normalisers(measured, shard, backend)
        found |= measure(measured, norms, shard, backend, others)
    return found


def _log_ratios(classes: Block, rows: BlockTargets) -> tuple[Tensor, Tensor, Tensor]:
    """(weights w, log p - log q, 0 where w is, [n, K] each; and log q [n, K + 1]) of a sample."""
    assert classes.teacher is not None and rows.targets.weights is not None
    log_q = classes.student.raw.log_softmax(1).clamp(min=LOG_ZERO)
    log_p = classes.teacher.raw[:, :-1]
    weights = rows.targets.weights.to(classes.dtype).where(rows.ids >= 0, 0.0)
    ratio = (log_p - log_q[:, :-1]).masked_fill(weights == 0, 0.0)
    return weights, ratio.masked_fill(ratio > INFINITE_RATIO, torch.inf), log_q


def _sampled_measures(classes: Block, rows: BlockTargets, names: set[str]) -> dict[str, Tensor]:
    """Unbiased estimates of the measures that are linear in p."""
    weights, ratio, _ = _log_ratios(classes, rows)
    found = {}
    if "divergence" in names:
        found["divergence"] = (weights * ratio).sum(1)
    if "teacher_entropy" in names:
        assert classes.teacher is not None
        log_p = classes.teacher.raw[:, :-1].masked_fill(weights == 0, 0.0)
        found["teacher_entropy"] = -(weights * log_p).sum(1)
    return found


def _sampled_loss(classes: Block, rows: BlockTargets, objective: AMiD,
                  values: Mapping[PerToken, Tensor]) -> BlockLoss:
    """Forward KL of sampled weights; its gradient in the classes' own."""
    (_, order), = objective.resolved(values).order_weights
    factor = None if objective.token_weight is None else values[objective.token_weight]
    weights, ratio, log_q = _log_ratios(classes, rows)
    kd = order * (weights * ratio).sum(1)
    if classes.gradient is not None:
        assert classes.kd_scale is not None
        scale = classes.kd_scale * order
        scale = scale if factor is None else scale * factor
        torch.mul(log_q.exp(), weights.sum(1, keepdim=True), out=classes.gradient)
        classes.gradient[:, :-1] -= weights
        classes.gradient.mul_(scale[:, None])
    return BlockLoss(kd, None, factor, {})


def _write_gradient(block: Block, rows: BlockTargets, classes: _Classes,
                    backend: Backend) -> None:
    """Write the loss's gradient into `block.gradient`, whose weights are those of its tokens."""
    student, ce_scale, tau = block.student, block.ce_scale, block.student.temperature
    count, rest, log_z = rows.ids.shape[1], classes.rest, classes.log_z
    of_class = classes.block.gradient
    if of_class is None:
        of_class = torch.zeros_like(classes.block.student.raw)
    # Of the columns taken out, by their untempered logits: a label that is no id is of the rest.
    of_rest = (classes.logits[:, count:] / tau - rest[0][:, None] - rest[1][:, None]).exp()
    own = torch.cat([of_class[:, :-1], of_class[:, -1:] * of_rest], 1) / tau
    # The kernels take rows of numbers to lie side by side.
    of_rest_class = factor = of_class[:, -1].contiguous()
    if ce_scale is not None:
        assert log_z is not None and rows.labels is not None
        onehot = (classes.ids == rows.labels[:, None]) & (classes.ids >= 0)
        z = (classes.logits - log_z[0][:, None] - log_z[1][:, None]).exp()
        own += ce_scale[:, None] * (z - onehot.to(z.dtype))
        # Not above 0 but where nothing is left, of which `rest` is no sum.
        of_rest_z = ((rest[0] - log_z[0]) + (rest[1] - log_z[1])).clamp(max=0)
        factor = factor + ce_scale * of_rest_z.exp()
    student.chain(own, classes.logits)
    no_labels = torch.full((block.tokens,), -1, dtype=torch.int64, device=block.device)
    others = replace(block, labels=no_labels, kd_scale=None)
    if ce_scale is None or tau == 1:
        others = replace(others, student=_tempered(student), ce_scale=factor)
        backend.write_gradient(others, RowNormalisers(None, None, rest), None)
    else:
        others = replace(others, label_scale=-of_rest_class)
        backend.write_gradient(others, RowNormalisers(rest, None, log_z), None)
    # Its zeros at the columns that were taken out receive their own.
    assert block.gradient is not None
    if block.gradient.shape[1]:
        block.gradient.scatter_add_(1, classes.columns,
                                    own.where(classes.held, 0.0).to(block.gradient.dtype))
