"""Several models' heads as one: the logits of a weighted sum of models, made in one workspace.

What is fused with a head needs its logits in blocks and nothing else, so a sum of models is a
teacher like any other: their hidden states lie side by side, and no head's weight is copied. The
sum is kept in fp32: partial sums in bf16 would round once per model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amid_ds.errors import InputError
from amid_ds.losses import tiles
from amid_ds.losses.block import Logits
from amid_ds.losses.blocks import adds_in_fp32, slices
from amid_ds.losses.lm_head import LMHead, raw_logits


@dataclass(frozen=True)
class SummedHead:
    """Heads of several models as one teacher's: Σ factor · logits. Replaces

        hidden = torch.cat([hidden_of_each_model], -1)
        logits = sum(factor * head(part) for factor, head, part in zip(factors, heads, ...))

    Each head's own bias, scale and soft cap come first. All have the same rows of one vocabulary,
    and one dtype. Where one head says -inf the sum does too, and two of opposite sign are NaN.
    Raises InputError without a head, or where heads and factors are not as many.
    """

    heads: tuple[LMHead, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.heads or len(self.heads) != len(self.factors):
            raise InputError(f"{len(self.heads)} heads and {len(self.factors)} factors",
                             "as many, and one at least", "give a factor for each head")

    @property
    def rows(self) -> int:
        """Rows of the vocabulary here: those that every head has."""
        return min(head.rows for head in self.heads)

    @property
    def biases(self) -> list[Tensor]:
        """The heads' biases [V_local]: of those that have one."""
        return [bias for head in self.heads for bias in head.biases]

    @property
    def logit_like(self) -> Tensor:
        """A tensor without elements, of the logits' dtype and device."""
        weight = self.heads[0].weight
        return weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))

    def parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Each model's hidden states [n, H_i] of hidden [n, Σ H_i]."""
        return hidden.split([head.weight.shape[1] for head in self.heads], 1)

    def logits(self, hidden: Tensor, columns: int, workspace: Tensor) -> Logits:
        """The first `columns` logits of hidden [n, Σ H_i], made in `workspace`, detached."""
        raw = raw_logits(len(hidden), columns, workspace)
        beta = 0
        for head, factor, part in zip(self.heads, self.factors, self.parts(hidden), strict=True):
            _add_logits(raw, beta, factor, head, part)
            beta = 1
        return Logits(raw)


def _add_logits(total: Tensor, beta: int, factor: float, head: LMHead, hidden: Tensor) -> None:
    """total [n, columns] = beta · total + factor · the logits of `head`.

    In one product where the head is linear and the device adds in the total's dtype; else in parts
    of the vocabulary, because the head's own logits are a temporary then.
    """
    weight, columns = head.weight.detach()[:total.shape[1]], total.shape[1]
    bias = None if head.bias is None else head.bias.detach()[:columns]
    fits = adds_in_fp32(total.device, total.dtype)
    if head.softcap is None and (fits or total.dtype == hidden.dtype):
        options = {} if total.dtype == hidden.dtype else {"out_dtype": total.dtype}
        torch.addmm(total, hidden, weight.t(), beta=beta, alpha=factor * head.scale, out=total,
                    **options)
        if bias is not None:
            total.add_(bias, alpha=factor * head.scale)
        return
    step = max(1, tiles.product_elements(total.device) // max(1, len(hidden)))
    for part in slices(columns, step):
        product = (torch.mm(hidden, weight[part].t(), out_dtype=total.dtype)
                   if fits and total.dtype != hidden.dtype else
                   torch.mm(hidden, weight[part].t()).to(total.dtype))
        if bias is not None:
            product.add_(bias[part])
        logits = Logits(product, head.scale, head.softcap).read(total.dtype).mul_(factor)
        total[:, part] = logits if beta == 0 else total[:, part].add_(logits)


# What `linear_amid_loss` takes as a teacher's head, and `linear_argmax` as any model's.
AnyHead = LMHead | SummedHead
