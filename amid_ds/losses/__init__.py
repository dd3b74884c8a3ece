"""The AMiD objective and its loss.

Bottom up: `divergences`, `measures` of a token and the `objective` as a value, `reference` its
naive twin; `block` turns a block of logits into loss and gradient through a backend, `elementwise`
(torch) or `kernels` (Triton); `fused` goes from hidden states to the loss in blocks.
"""

from amid_ds.losses.argmax import linear_argmax
from amid_ds.losses.blocks import default_workspace_bytes
from amid_ds.losses.checks import IGNORE_INDEX
from amid_ds.losses.divergences import (
    AlphaBeta,
    ConcreteScore,
    Divergence,
    LogProbs,
    SampledReverseKL,
    register,
)
from amid_ds.losses.fused import LossOutput, amid_loss, linear_amid_loss
from amid_ds.losses.grown import FirstPieces, grown_amid_loss
from amid_ds.losses.lm_head import LMHead
from amid_ds.losses.measures import PerToken
from amid_ds.losses.objective import AMiD, preset
from amid_ds.losses.sparse import SparseTargets
from amid_ds.losses.summed_head import AnyHead, SummedHead

__all__ = ["IGNORE_INDEX", "AMiD", "AlphaBeta", "AnyHead", "ConcreteScore", "Divergence",
           "FirstPieces", "LMHead", "LogProbs", "LossOutput", "PerToken", "SampledReverseKL",
           "SparseTargets", "SummedHead", "amid_loss", "default_workspace_bytes",
           "grown_amid_loss", "linear_amid_loss", "linear_argmax", "preset", "register"]
