"""A language model's head: the matrix products of a block with it, forward and backward.

Gradients are made in forward and given away in backward: `take_gradients` and `scaled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amid_ds.errors import InputError
from amid_ds.losses import tiles
from amid_ds.losses.block import Logits
from amid_ds.losses.blocks import adds_in_fp32, row_stride, slices

# Rows that a CPU multiplies at once in backward: where the dtypes of the factors or of the result
# differ, it makes a temporary in the wider one. A GPU makes none.
BACKWARD_ROWS = 64


@dataclass(frozen=True)
class LMHead:
    """A language model's head: logits = scale · (h Wᵀ + b), then softcap · tanh(logits / softcap).

    weight [V_local, H] and bias [V_local] have the hidden states' dtype. softcap=None: no cap.
    Raises InputError for a cap that is not above 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise InputError(f"softcap={self.softcap}", "a cap above 0, or None",
                             "None means no cap")

    @property
    def rows(self) -> int:
        """Rows of the vocabulary here."""
        return self.weight.shape[0]

    @property
    def biases(self) -> list[Tensor]:
        """The bias [V_local], if there is one."""
        return [] if self.bias is None else [self.bias]

    @property
    def logit_like(self) -> Tensor:
        """A tensor of the logits' dtype and device."""
        return self.weight

    def logits(self, hidden: Tensor, columns: int, workspace: Tensor) -> Logits:
        """The first `columns` logits of hidden [n, H], made in `workspace`.

        workspace: a flat buffer of at least n · row_stride(columns) elements. Detached: neither the
        head nor the hidden states get a gradient through them.
        """
        raw = raw_logits(len(hidden), columns, workspace)
        weight = self.weight.detach()[:columns].t()
        if self.bias is None:
            torch.mm(hidden, weight, out=raw)
        else:
            torch.addmm(self.bias.detach()[:columns], hidden, weight, out=raw)
        return Logits(raw, self.scale, self.softcap)


def raw_logits(tokens: int, columns: int, workspace: Tensor) -> Tensor:
    """[tokens, columns] at the beginning of a flat workspace, in rows that are aligned."""
    stride = row_stride(columns, workspace.device.type)
    return workspace[:tokens * stride].view(tokens, stride)[:, :columns]


def logits_workspace(tokens: int, columns: int, weight: Tensor) -> Tensor:
    """Room for the first `columns` logits of `tokens` tokens, of the weight's dtype and device."""
    return weight.new_empty(tokens * row_stride(columns, weight.device.type))


class HeadGradients:
    """Sums over blocks of the gradients of hidden [N, H], weight [V_local, H] and bias [V_local].

    They are held in `dtype`, the arithmetic's, but for the weight's of a single block in bf16,
    which nothing is added to: it is held in bf16. In fp16 it would underflow, for a scale on the
    loss comes later. wants: of which of the three there is one.
    """

    def __init__(self, hidden: Tensor, head: LMHead, columns: int, dtype: torch.dtype,
                 wants: tuple[bool, ...], single_block: bool) -> None:
        self.head_weight = head.weight.detach()[:columns]
        self.columns, self.first = columns, True
        low = single_block and head.weight.dtype == torch.bfloat16
        self.hidden, self.weight, self.bias = (
            torch.empty(x.shape, dtype=held, device=hidden.device)
            if x is not None and wanted else None
            for x, held, wanted in zip((hidden, head.weight, head.bias),
                                       (dtype, torch.bfloat16 if low else dtype, dtype), wants,
                                       strict=True))
        if self.hidden is not None:
            # Masked tokens are not written to.
            self.hidden.zero_()
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                # The padding rows are not written to; the first block writes the others.
                tensor[columns:] = 0

    def add(self, gradient: Tensor, hidden: Tensor, tokens: Tensor | slice) -> None:
        """Add a block: gradient [n, columns] of raw logits, hidden [n, H], its tokens' places."""
        if self.hidden is not None:
            self.hidden[tokens] = _product(gradient, self.head_weight, self.hidden.dtype)
        if self.weight is not None:
            _add_product(self.weight[:self.columns], gradient.t(), hidden, 0 if self.first else 1)
        if self.bias is not None:
            sums = gradient.sum(0, dtype=self.bias.dtype)
            self.bias[:self.columns] = sums if self.first else self.bias[:self.columns] + sums
        self.first = False

    def totals(self) -> list[Tensor | None]:
        """[hidden, weight, bias], None for one that was not wanted."""
        if self.first:
            # No valid token: zero gradients, so that the graph stays connected.
            for tensor in (self.weight, self.bias):
                if tensor is not None:
                    tensor.zero_()
        return [self.hidden, self.weight, self.bias]


def take_gradients(ctx: Any) -> list[Tensor | None]:
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


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor, rounded to `dtype` in the same pass; in place if that is its dtype.

    factor: a scalar, or one entry per row [n].
    """
    result = gradient if dtype == gradient.dtype else torch.empty_like(gradient, dtype=dtype)
    at_once = gradient.device.type != "cpu" or gradient.dtype == factor.dtype == dtype
    per_row = factor.dim() > 0
    # A tensor without dimensions would be rounded to the gradient's dtype first.
    factor = factor.reshape(-1, *[1] * (gradient.dim() - 1))
    for rows in slices(len(gradient), len(gradient) if at_once else BACKWARD_ROWS):
        torch.mul(gradient[rows], factor[rows] if per_row else factor, out=result[rows])
    return result


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, in which it has been added up where the device can do that."""
    if a.dtype != dtype and adds_in_fp32(a.device, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta · total + a @ b; part by part if the product is of another dtype, and the device
    cannot add it up in the total's."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
        return
    if adds_in_fp32(total.device, total.dtype):
        # One tensor object for both: torch copies `total` to `out` first if they are two.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
        return
    step = max(1, tiles.product_elements(total.device) // b.shape[1])
    for start in range(0, total.shape[0], step):
        rows = slice(start, start + step)
        part = torch.mm(a[rows], b)
        total[rows] = part if beta == 0 else total[rows].add_(part)
