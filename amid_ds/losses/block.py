"""One block of tokens from logits to loss and gradient, between exchanges of row sums.

At most three exchanges for a loss of constant numbers: normalisers, then one or two of the
divergence. Measures are one more, after the normalisers, where numbers follow from them or they are
asked for; `agreement` is another. The arithmetic between the exchanges belongs to a backend, a
module with the functions of `Backend`: plain torch (elementwise.py) or Triton (kernels.py). The
exchanges are the same for both backends and for one process.

With D the divergence of a token, A = ∂D/∂log r, B = ∂D/∂log q at fixed r, w = ∂log r̃/∂log q and
g = w (A - r ΣA) + B, the gradient of a row is ∂D/∂s = (g - q Σg) / τ. Its sums over the vocabulary
are ΣD, ΣA, Σ(wA + B) and Σwr: `RowStatistics.sums`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses.divergences import INFINITE_RATIO, LOG_ZERO, ConcreteScore, SampledReverseKL
from amid_ds.losses.measures import MEASURES, PerToken, first_choices
from amid_ds.losses.objective import AMiD, ResolvedObjective


@dataclass(frozen=True)
class Logits:
    """One model's logits of a block: `raw` [n, width] as the product left them, then scaled, then
    capped; for the divergence divided by the temperature."""

    raw: Tensor
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def width(self) -> int:
        """Columns of the vocabulary."""
        return self.raw.shape[1]

    def columns(self, columns: slice) -> Logits:
        """These columns alone; a view."""
        return replace(self, raw=self.raw[:, columns])

    def read(self, dtype: torch.dtype) -> Tensor:
        """The untempered logits [n, width] in `dtype`; `raw` itself if nothing has to be done."""
        return self.scale_and_cap(self.raw.to(dtype))

    def tempered(self, dtype: torch.dtype) -> Tensor:
        """The logits [n, width] over τ."""
        logits = self.read(dtype)
        return logits if self.temperature == 1 else logits / self.temperature

    def scale_and_cap(self, raw: Tensor) -> Tensor:
        """scale · raw, then softcap · tanh(… / softcap) if there is a cap."""
        z = raw if self.scale == 1 else raw * self.scale
        return z if self.softcap is None else (z / self.softcap).tanh_().mul_(self.softcap)

    def chain(self, gradient: Tensor, z: Tensor) -> None:
        """Turn ∂L/∂z into ∂L/∂raw, in place: times scale · (1 - tanh²)."""
        if self.softcap is not None:
            gradient.mul_(1 - (z / self.softcap).square_())
        if self.scale != 1:
            gradient.mul_(self.scale)


@dataclass(frozen=True)
class Block:
    """n tokens of one shard: both models' logits, and the loss and the gradient asked of them."""

    # [n, width] of both models; no teacher: cross entropy alone.
    student: Logits
    teacher: Logits | None
    # None without a teacher, and until its numbers are known.
    objective: ResolvedObjective | None
    # Of the arithmetic: fp32, or fp64 if an input is.
    dtype: torch.dtype
    # [n] int64, counted from the first column here; negative for a token without a label.
    labels: Tensor | None = None
    # [n] ∂loss/∂kd_i and ∂loss/∂ce_i; None: no gradient from that part.
    kd_scale: Tensor | None = None
    ce_scale: Tensor | None = None
    # [n, width] that receives the gradient, may be the student's `raw`; None: value alone.
    gradient: Tensor | None = None
    # [n] the weight of ∂log q(label), of sampled tokens, which have no kd_scale; 0 without a label.
    label_scale: Tensor | None = None

    @property
    def tokens(self) -> int:
        """n."""
        return self.student.raw.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.student.raw.device

    @property
    def normaliser_names(self) -> list[str]:
        """The log-sum-exps that the loss needs, in order: of q and p for distillation, of z (the
        untempered student) for labels unless q is the same."""
        models = [] if self.teacher is None else ["q", "p"]
        differs = not models or self.student.temperature != 1
        return models + (["z"] if self.labels is not None and differs else [])

    def weighted(self, factor: Tensor) -> Block:
        """The same with both gradients' scales multiplied by a factor [n]."""
        kd, ce = (None if scale is None else scale * factor
                  for scale in (self.kd_scale, self.ce_scale))
        return replace(self, kd_scale=kd, ce_scale=ce)

    def tile(self, columns: slice) -> Block:
        """These columns alone, as a block with the logits, gradient and labels of the columns."""
        student = self.student.columns(columns)
        gradient = self.gradient
        if gradient is not None:
            # One tensor if it was one: a compiled function has to know of the alias.
            aliased = gradient is self.student.raw
            gradient = student.raw if aliased else gradient[:, columns]
        return replace(
            self, student=student, gradient=gradient,
            teacher=None if self.teacher is None else self.teacher.columns(columns),
            labels=None if self.labels is None else self.labels - columns.start)


@dataclass(frozen=True)
class RowNormalisers:
    """log Σ exp over the whole vocabulary, [2, n] in two parts (vocab_parallel.py)."""

    # Of the student's and the teacher's tempered logits; None without a teacher.
    log_q: Tensor | None
    log_p: Tensor | None
    # Of the student's untempered logits; None without labels.
    log_z: Tensor | None


@dataclass(frozen=True)
class RowStatistics:
    """The divergence's row statistics over the whole vocabulary."""

    # [2, n] log Σ r̃, in two parts; None if it is 0 by construction.
    log_assistant: Tensor | None
    # [4, n] ΣD, ΣA, Σ(wA + B), Σwr.
    sums: Tensor
    # [orders, 4, n] of a concrete score alone: Σ w₁, Σ w₂, Σ w₁δ, Σ w₂δ.
    residuals: Tensor | None = None


class Backend(Protocol):
    """The arithmetic of a block, between the matrix products."""

    def log_normalisers(self, block: Block) -> Tensor:
        """[k, 2, n] log Σ exp over this shard's columns, one for each of `normaliser_names`."""
        ...

    def measures(self, block: Block, norms: RowNormalisers, names: tuple[str, ...]) -> Tensor:
        """[k, n] sums over this shard's columns of the measures of these names."""
        ...

    def statistics(self, block: Block, norms: RowNormalisers, shard: VocabShard) -> RowStatistics:
        """The divergence's statistics over the whole vocabulary. At most two collectives."""
        ...

    def write_gradient(self, block: Block, norms: RowNormalisers,
                       stats: RowStatistics | None) -> None:
        """Write kd_scale · ∂D/∂raw + ce_scale · ∂CE/∂raw + label_scale · ∂log q(label)/∂raw into
        `block.gradient` [n, width].

        `block.gradient` may be the student's `raw`. stats: None without a teacher.
        """
        ...


def arithmetic_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """fp32, or fp64 if an input is."""
    dtypes = [x.dtype for x in (student, teacher) if x is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def needs_normaliser(objective: ResolvedObjective) -> bool:
    """True unless Σ r̃ = 1 by construction: at the ends of λ, and for α = -1; numbers alone tell.
    Never for a concrete score, whose residuals are centred."""
    if isinstance(objective.resolved_divergence, ConcreteScore):
        return False
    alpha, lam = objective.alpha, objective.lam
    if isinstance(alpha, Tensor) or isinstance(lam, Tensor) or objective.power != 1:
        return True
    return lam not in (0, 1) and alpha != -1


def normalised(x: Tensor, log_sum: Tensor) -> Tensor:
    """x [n, tile] less a log-sum-exp [2, n], part by part; LOG_ZERO for -inf."""
    return (x - log_sum[0][:, None]).sub_(log_sum[1][:, None]).clamp_(min=LOG_ZERO)


class BlockLoss(NamedTuple):
    """What a block's tokens cost, all [n]."""

    # None without a teacher.
    kd: Tensor | None
    # None without labels.
    ce: Tensor | None
    # The objective's token_weight, which is in neither; None for 1.
    factor: Tensor | None
    # By the names that were asked for.
    statistics: dict[str, Tensor]


def forward_backward_block(block: Block, objective: AMiD | None, shard: VocabShard,
                           backend: Backend, statistics: tuple[str, ...] = (),
                           values: Mapping[PerToken, Tensor] | None = None) -> BlockLoss:
    """The loss of a block, whose own objective is not set; the gradient is in `block.gradient`.

    objective: None exactly without a teacher. statistics: names to report. values: [n] of all of
    the objective's `per_token`; None: from this block's measures.
    At most three collectives, one more for measures, and one more for agreement.
    """
    divergence = None if objective is None else objective.resolved_divergence
    sampled = divergence if isinstance(divergence, SampledReverseKL) else None
    norms, labels = row_normalisers(block, shard, backend, of_teacher=sampled is not None)
    factor = stats = kd = None
    measured: dict[str, Tensor] = {}
    if objective is not None:
        asked = {*statistics, *(objective.measures if values is None else ())}
        measured = measure(block, norms, shard, backend, asked)
        if values is None:
            values = {each: each.values(measured[each.by]) for each in objective.per_token}
        if objective.token_weight is not None:
            factor = values[objective.token_weight]
            block = block.weighted(factor)
        if sampled is not None:
            assert labels is not None
            kd, block = _sampled_tokens(block, norms, labels, shard, backend, sampled)
        else:
            block = replace(block, objective=objective.resolved({**values}))
            stats = backend.statistics(block, norms, shard)
            kd = stats.sums[0]
    elif statistics:
        # Of the student alone (checks.py): of both sides, it is what it would be.
        alone = RowNormalisers(norms.log_z, norms.log_z, norms.log_z)
        measured = measure(replace(block, teacher=block.student), alone, shard, backend,
                           {*statistics})
    ce = None
    if labels is not None:
        assert norms.log_z is not None
        ce = cross_entropy(labels[0], norms.log_z)
    if block.gradient is not None:
        backend.write_gradient(block, norms, stats)
    return BlockLoss(kd, ce, factor, {name: measured[name] for name in statistics})


def cross_entropy(label_logits: Tensor, log_z: Tensor) -> Tensor:
    """[n] from the labels' logits [n], -inf for a token without one, and log Σ exp z [2, n]."""
    loss = log_z[0] - label_logits + log_z[1]
    # No shard has the logit of a token without a label.
    ce = torch.where(label_logits == -torch.inf, 0.0, loss)
    return ce.masked_fill_(ce > INFINITE_RATIO, torch.inf)


def weighted_part(weights: Tensor, part: Tensor) -> Tensor:
    """weights · part [n]; 0 where the weight is, though the part be infinite."""
    return torch.where((weights == 0) & part.isinf(), 0.0, weights * part)


def _sampled_tokens(block: Block, norms: RowNormalisers, labels: Tensor, shard: VocabShard,
                    backend: Backend, divergence: SampledReverseKL) -> tuple[Tensor, Block]:
    """(log q - log p of the labels [n], the block with the weights of their pull) for the labels'
    logits [2, n] of student and teacher. With a baseline one collective."""
    assert block.teacher is not None and norms.log_q is not None and norms.log_p is not None
    log_q, log_p = (
        ((logit / model.temperature - norm[0]) - norm[1]).masked_fill_(logit <= LOG_ZERO, LOG_ZERO)
        for logit, model, norm in zip(labels, (block.student, block.teacher),
                                      (norms.log_q, norms.log_p), strict=True))
    # No shard has the logit of a token without a label.
    unlabelled = labels[0] == -torch.inf
    kd = (log_q - log_p).masked_fill_(unlabelled, 0.0)
    kd = torch.where(kd.abs() > INFINITE_RATIO, kd * torch.inf, kd)
    if block.kd_scale is None:
        return kd, block
    advantage = kd
    if divergence.baseline == "kl":
        exact = replace(block, objective=AMiD(lam=1.0, order="qr").resolved({}))
        baseline = backend.statistics(exact, norms, shard).sums[0]
        advantage = kd - baseline.masked_fill(baseline.isinf(), 0.0)
    pull = (block.kd_scale * advantage).masked_fill_(unlabelled, 0.0)
    return kd, replace(block, kd_scale=None, label_scale=pull)


def measure(block: Block, norms: RowNormalisers, shard: VocabShard, backend: Backend,
            names: set[str]) -> dict[str, Tensor]:
    """The measures [n] of these names over the whole vocabulary. One collective for all but
    `agreement`, one for that."""
    found: dict[str, Tensor] = {}
    summed = tuple(name for name in MEASURES if name in names)
    if summed:
        sums = shard.sum(backend.measures(block, norms, summed))
        found.update(zip(summed, sums, strict=True))
    if "agreement" in names:
        assert block.teacher is not None
        # The same ids are first whatever the scale, the cap and the temperature.
        ids, peaks = first_choices([block.student.raw, block.teacher.raw], shard)
        agree = (ids[0] == ids[1]).to(block.dtype)
        found["agreement"] = torch.where(peaks.isnan().any(0), torch.nan, agree)
    return found


def row_normalisers(block: Block, shard: VocabShard, backend: Backend,
                    of_teacher: bool = False) -> tuple[RowNormalisers, Tensor | None]:
    """(the normalisers, the labels' logits [1, n] or None) over the whole vocabulary. One
    collective.

    of_teacher: the labels' logits are [2, n], the student's and the teacher's.
    A label's logit travels as one more log-sum-exp: the shards that do not hold it have -inf.
    """
    local, count = backend.log_normalisers(block), len(block.normaliser_names)
    if block.labels is not None:
        models = [block.student, block.teacher] if of_teacher else [block.student]
        labels = torch.stack([_label_logits(block, model) for model in models if model is not None])
        local = torch.cat([local, torch.stack([labels, torch.zeros_like(labels)], 1)])
    rows = shard.logsumexp(local)
    by_name = dict(zip(block.normaliser_names, rows, strict=False))
    log_q = by_name.get("q")
    norms = RowNormalisers(log_q, by_name.get("p"), by_name.get("z", log_q))
    return norms, None if block.labels is None else rows[count:, 0]


def _label_logits(block: Block, model: Logits) -> Tensor:
    """[n] the label's logit of a model if this shard holds it (at least LOG_ZERO), else -inf."""
    assert block.labels is not None
    width = model.width
    if not width:
        return torch.full((block.tokens,), -torch.inf, dtype=block.dtype, device=block.device)
    here = (block.labels >= 0) & (block.labels < width)
    raw = model.raw.gather(1, block.labels.clamp(0, width - 1)[:, None])[:, 0]
    logits = model.scale_and_cap(raw.to(block.dtype)).clamp(min=LOG_ZERO)
    return torch.where(here, logits, -torch.inf)
