"""A model's first choices, in blocks of tokens like the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import checks
from amid_ds.losses.blocks import slices, tokens_per_block
from amid_ds.losses.lm_head import logits_workspace
from amid_ds.losses.measures import first_choices
from amid_ds.losses.summed_head import AnyHead


@torch.no_grad()
def linear_argmax(
    hidden: Tensor,                    # [N, H]
    head: AnyHead,                     # weight [V_local, H]
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
    device = hidden.device
    layout = checks.check_vocabulary({"head": head.rows}, vocab_size, shard,
                                     hidden.shape[0], device)
    size = tokens_per_block(len(hidden), layout, 1, head.logit_like.element_size(), workspace_bytes,
                            device, tiled=True)
    chosen = torch.empty(len(hidden), dtype=torch.int64, device=device)
    workspace = logits_workspace(min(size, len(hidden)), layout.valid, head.logit_like)
    for rows in slices(len(hidden), size):
        raw = head.logits(hidden[rows], layout.valid, workspace).raw
        chosen[rows] = first_choices([raw], layout.shard)[0][0]
    return chosen
