"""One block of tokens from logits to loss and gradient: at most three exchanges of row sums.

The arithmetic between the exchanges belongs to a backend, a module with the three functions of `Backend`: plain torch
(elementwise.py) or Triton (kernels.py). What is exchanged, and when, is here and the same for both and for one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses.objective import AMiD


@dataclass(frozen=True)
class Logits:
    """One model's logits of a block: `raw` [n, width] as the product left them, then scaled, then capped."""

    raw: Tensor
    scale: float = 1.0
    softcap: float | None = None

    @property
    def width(self) -> int:
        return self.raw.shape[1]

    def read(self, dtype: torch.dtype) -> Tensor:
        """The logits [n, width] in `dtype`; `raw` itself where nothing has to be done."""
        return self.of(self.raw.to(dtype))

    def of(self, raw: Tensor) -> Tensor:
        z = raw if self.scale == 1 else raw * self.scale
        return z if self.softcap is None else (z / self.softcap).tanh_().mul_(self.softcap)

    def chain(self, gradient: Tensor, z: Tensor) -> None:
        """Turn ∂L/∂z into ∂L/∂raw, in place: times scale · (1 - tanh²)."""
        if self.softcap is not None:
            gradient.mul_(1 - (z / self.softcap).square_())
        if self.scale != 1:
            gradient.mul_(self.scale)


def needs_normaliser(objective: AMiD) -> bool:
    """Whether log Σ r̃ has to be found: not at the ends of λ, nor for α = -1, where r̃ sums to 1 already."""
    return objective.lam not in (0, 1) and objective.alpha != -1


def normalised(x: Tensor, log_sum: Tensor) -> Tensor:
    """x [n, tile] less a log-sum-exp [2, n], part by part."""
    return (x - log_sum[0][:, None]).sub_(log_sum[1][:, None])


@dataclass
class Block:
    """n tokens of one shard. Filled in from phase to phase; row statistics are of the whole vocabulary."""

    student: Logits
    teacher: Logits | None             # None: cross entropy alone
    objective: AMiD | None             # None exactly where `teacher` is
    dtype: torch.dtype                 # of the arithmetic: fp32, or fp64 where an input is
    labels: Tensor | None = None       # [n] int64, counted from the first column here; negative where there is none
    kd_scale: Tensor | None = None     # [n] ∂loss/∂kd_i; None: no gradient from kd
    ce_scale: Tensor | None = None     # [n] ∂loss/∂ce_i
    gradient: Tensor | None = None     # [n, width] where the gradient goes; None: value alone
    log_p: Tensor | None = None        # [2, n] log Σ exp of the teacher's tempered logits, in two parts (joined)
    log_q: Tensor | None = None        # [2, n] … of the student's
    log_z: Tensor | None = None        # [2, n] … of the student's untempered logits, for the labels
    log_assistant: Tensor | None = None   # [2, n] log Σ r̃; None where it is 0 by construction
    sums: Tensor | None = None         # [4, n] ΣD, ΣA, Σ(wA + B), Σwr

    @property
    def tokens(self) -> int:
        return self.student.raw.shape[0]

    @property
    def device(self) -> torch.device:
        return self.student.raw.device

    @property
    def normalisers(self) -> list[str]:
        """Which log-sum-exps the first phase needs: q and p for distillation, z for labels where q is not the same."""
        tempered = self.objective is not None and self.objective.temperature != 1
        models = [] if self.teacher is None else ["q", "p"]
        return models + (["z"] if self.labels is not None and (tempered or not models) else [])


    def tile(self, columns: slice) -> Block:
        """These columns alone, as a block whose logits, gradient and labels are theirs."""
        def part(model: Logits | None) -> Any:
            return None if model is None else replace(model, raw=model.raw[:, columns])

        student = part(self.student)
        gradient = self.gradient
        if gradient is not None:       # one tensor where it was one, so that a compiled function knows
            gradient = student.raw if gradient is self.student.raw else gradient[:, columns]
        labels = None if self.labels is None else self.labels - columns.start
        return replace(self, student=student, teacher=part(self.teacher), gradient=gradient, labels=labels)


class Backend(Protocol):
    """The arithmetic of a block, between the matrix products."""

    def log_normalisers(self, block: Block) -> Tensor:
        """[len(block.normalisers), 2, n] log Σ exp over this shard's columns, in two parts (vocab_parallel.joined)."""
        ...

    def statistics(self, block: Block, shard: VocabShard) -> Tensor:
        """`block.sums` over the whole vocabulary, in at most two collectives; sets `block.log_assistant`."""
        ...

    def write_gradient(self, block: Block) -> None:
        """∂loss/∂raw logits, from kd_scale and ce_scale, into `block.gradient`; it may be the student's `raw`."""
        ...


def solve(block: Block, shard: VocabShard, backend: Backend) -> tuple[Tensor | None, Tensor | None]:
    """kd [n] and ce [n] of a block, and its gradient written to `block.gradient`. At most three collectives."""
    local = backend.log_normalisers(block)
    if block.labels is not None:
        label = _label_logits(block)
        local = torch.cat([local, torch.stack([label, torch.zeros_like(label)])[None]])
    rows = shard.logsumexp(local)      # the label's logit too: the shards that do not hold it have -inf
    known = dict(zip(block.normalisers, rows, strict=False))
    block.log_q, block.log_p, block.log_z = known.get("q"), known.get("p"), known.get("z", known.get("q"))
    kd = ce = None
    if block.objective is not None:
        block.sums = backend.statistics(block, shard)
        kd = block.sums[0]
    if block.labels is not None:
        assert block.log_z is not None
        label = rows[-1, 0]
        ce = torch.where(label == -torch.inf, 0.0, block.log_z[0] - label + block.log_z[1])
    if block.gradient is not None:
        backend.write_gradient(block)
    return kd, ce


def _label_logits(block: Block) -> Tensor:
    """[n] the label's logit where this shard holds it, else -inf."""
    assert block.labels is not None
    width = block.student.width
    if not width:
        return torch.full((block.tokens,), -torch.inf, dtype=block.dtype, device=block.device)
    here = (block.labels >= 0) & (block.labels < width)
    raw = block.student.raw.gather(1, block.labels.clamp(0, width - 1)[:, None])[:, 0]
    return torch.where(here, block.student.of(raw.to(block.dtype)), -torch.inf)
