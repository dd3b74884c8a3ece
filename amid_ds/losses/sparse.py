"""A teacher's distributions written down sparsely: what is kept of them, and what p is outside.

The value alone; sparse_block.py is the loss on it, sparse_checks.py what the two refuse together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from amid_ds.errors import InputError

Rest: TypeAlias = Literal["ghost", "spread", "drop"]
RESTS = ("ghost", "spread", "drop")
# Of an entry that is none, by the field.
_EMPTY = {"ids": -1, "log_probabilities": -torch.inf, "weights": 0.0}


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """The teacher's distribution p at n tokens, known at K ids of the V of the vocabulary.

    ids [n, K] int64: ids of the whole vocabulary, each once in a row; -1 for no entry.
    log_probabilities [n, K] fp32: log p of the ids, at temperature 1; not read where there is no
        entry.
    log_rest [n] fp32: log of p's mass outside the ids, -inf for none. With these three alone the
        targets are `topk`: the ids are the K most probable ones, the first of a row the first.
    weights [n, K] fp32: then they are `sample`: the ids were drawn, and the mean of an id's weight
        over the draws is its p, 0 where it was not drawn; log_rest is not read.
    label_log_probabilities [n] fp32: log p of the row's next token, whether it is among the ids or
        not; for the measure label_probability.

    rest: what p is outside the ids S of a row, P its mass there and q the student.

        ghost    K + 1 classes: the ids of S, and "everything else" with p = P and q = Σ q outside
                 S; the divergence, r, and every measure are of these classes (the ghost token of
                 arXiv 2503.16870). The default of `topk`. Of KL(p‖q) it leaves out P times the KL
                 of the two models within the rest, the part of the tail that 2602.20816 takes
                 apart: a lower bound.
        spread   V ids: p(x) = P / (V - K) for each x outside S. Every number is of these V ids.
                 Dearer: a second block of logits, and no product.
        drop     `topk`: p(x) / Σ_S p for x in S, and 0 outside, over the classes of `ghost`: the
                 same as over V ids for KL, total variation, Hellinger and α-β with α + β = 1, at
                 power 1. Its p is larger on S than the teacher's (2503.16870: biased). What is
                 infinite where p is 0 and q is not, KL(q‖p), is refused.
                 `sample`: the weights as they are, 0 outside. The default, and the only one.

    At K = V all three are the whole distribution, and the loss is that of the teacher's logits.

    Of `sample`, with w the weights, forward KL alone:
        kd = Σ w (log p - log q),    ∂kd/∂s = ((Σ w) q - w) / τ
    Their means over the draws are KL(p‖q) and its gradient, because both are linear in w. (Random
    sampling KD, arXiv 2503.16870, learns w by KL(w‖q): the same gradient, another value.) Nothing
    else of the objective is linear in p: `topk` is for that.

    .take, .to, .map and SparseTargets.concatenate make others of it.
    Raises InputError for shapes, dtypes and parts that do not fit.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_rest: Tensor | None = None
    weights: Tensor | None = None
    label_log_probabilities: Tensor | None = None
    # None: ghost for `topk`, drop for `sample`.
    rest: Rest | None = None

    def __post_init__(self) -> None:
        sampled = self.weights is not None
        if self.rest is None:
            object.__setattr__(self, "rest", "drop" if sampled else "ghost")
        if self.rest not in RESTS or (sampled and self.rest != "drop"):
            raise InputError(f"rest={self.rest!r}" + (" with sampled weights" if sampled else ""),
                             "drop" if sampled else f"one of {', '.join(RESTS)}",
                             "a sample says nothing of what was not drawn: leave rest out, or take "
                             "the teacher's topk" if sampled else "ghost is the default")
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64 or (
                self.ids.shape[1] == 0 < len(self.ids)):
            raise InputError(f"ids {list(self.ids.shape)} of {self.ids.dtype}",
                             "[n, K] of torch.int64, K above 0", "-1 stands for no entry")
        for name, tensor in self._tensors().items():
            shape = self.ids.shape if name in _EMPTY else self.ids.shape[:1]
            if tensor.shape != shape or not (name == "ids" or tensor.is_floating_point()):
                raise InputError(f"{name} {list(tensor.shape)} of {tensor.dtype}",
                                 f"{list(shape)} of a float dtype",
                                 "one entry per id, or per token")
        if self.log_rest is None and not sampled and self.rest != "drop":
            raise InputError(f"rest={self.rest!r} without log_rest", "log_rest [n]",
                             "pass the log of the mass outside the ids, or rest='drop'")

    def __len__(self) -> int:
        """n."""
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        """By the values: so DeepSpeed compares what tensor-parallel peers are first called with."""
        if not isinstance(other, SparseTargets):
            return False
        own, its = self._tensors(), other._tensors()
        return self.rest == other.rest and own.keys() == its.keys() and all(
            torch.equal(own[name].cpu(), its[name].cpu()) for name in own)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def sampled(self) -> bool:
        """True for `sample`, False for `topk`."""
        return self.weights is not None

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        """The same with `function` applied to every tensor."""
        return SparseTargets(**{name: function(tensor) for name, tensor in self._tensors().items()},
                             rest=self.rest)

    def take(self, index: Tensor | slice) -> SparseTargets:
        """Those of some tokens: numbers [m], a mask [n] or a slice."""
        return self.map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> SparseTargets:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    @staticmethod
    def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Those of all the parts' tokens, in order; the narrower ones are filled with no entries.

        Raises InputError if the parts have not the same fields and `rest`.
        """
        kinds = {(part.rest, *part._tensors()) for part in parts}
        if len(kinds) != 1:
            raise InputError(f"sparse targets of {len(kinds)} kinds: {sorted(map(str, kinds))}",
                             "parts with the same fields and the same rest",
                             "concatenate what was written by one method")
        width = max(part.ids.shape[1] for part in parts)
        joined = {name: torch.cat([_widened(name, part._tensors()[name], width) for part in parts])
                  for name in parts[0]._tensors()}
        return SparseTargets(**joined, rest=parts[0].rest)

    def _tensors(self) -> dict[str, Tensor]:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}


def _widened(name: str, tensor: Tensor, width: int) -> Tensor:
    """[n, K] -> [n, width] with no entries; a tensor of one number per token as it is."""
    if name not in _EMPTY:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=_EMPTY[name])
