"""The AMiD objective: `objective` says what is minimised, `fused` and `elementwise` do it, `reference` is the truth."""

from amid_ds.losses.fused import (
    LMHead,
    LossOutput,
    amid_loss,
    default_workspace_bytes,
    linear_amid_loss,
    linear_argmax,
)
from amid_ds.losses.objective import AlphaBeta, AMiD, Divergence, LogProbs, preset, register

__all__ = ["AMiD", "AlphaBeta", "Divergence", "LMHead", "LogProbs", "LossOutput", "amid_loss",
           "default_workspace_bytes", "linear_amid_loss", "linear_argmax", "preset", "register"]
