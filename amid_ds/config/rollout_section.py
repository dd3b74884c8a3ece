"""The section `rollout`: steps that learn from what the student samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from amid_ds.config.loss_section import OwnLoss
from amid_ds.config.section import NonNegative, PositiveInt, Section, Share


class Replay(Section):
    """DistiLLM's adaptive off-policy scheme (arXiv 2402.03898).

    With the threshold's probability a step learns from samples of the student, new or kept ones.
    The threshold rises by 0.1 whenever the validation loss has risen.
    """

    init_threshold: Share = 0.0
    """The threshold at the first step."""
    loss_eps: NonNegative = 0.1
    """The least rise of the validation loss, in nats per token, since the threshold rose last."""
    # A replay draws as many completions as the batch has prompts. If these share rows and
    # outnumber the capacity, the step learns from all that are kept, which is less than a batch.
    capacity: PositiveInt = 1000
    """Completions that are kept, over all ranks."""
    replay_ratio: Literal["constant", "increasing", "decreasing"] = "decreasing"
    """The share of the threshold at which the student samples anew once the buffer is full.
    constant: a half; increasing: from 0 to 1 over the run; decreasing: from 1 to 0."""


class Rollout(Section):
    """Steps with responses that the student samples for the batch's prompts."""

    share: Share | None = None
    """The share of such steps, as in GKD; or else `adaptive`."""
    adaptive: Replay | None = None
    """DistiLLM's scheme; or else `share`."""
    temperature: NonNegative = 1.0
    """Of the sampling; 0: the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens that have this probability together."""
    max_new_tokens: PositiveInt = 256
    """The longest response."""
    batch_size: PositiveInt = 32
    """Prompts that a rank completes at once."""
    end_of_text: str | None = None
    """The token that ends a response; None: the ends that the student and its tokenizer name."""
    loss: OwnLoss | None = None
    """Keys in place of those of the recipe's `loss`, for what the student has sampled."""
    estimator: Literal["exact", "sampled"] = "exact"
    """exact: the divergence, summed over the vocabulary; sampled: the reverse KL's policy gradient
    from the sampled tokens alone."""

    @model_validator(mode="after")
    def _one_scheme(self) -> Rollout:
        if (self.share is None) == (self.adaptive is None):
            raise ValueError("one of `share` and `adaptive` says when the student samples")
        return self

    def require_room(self, seq_length: int, global_batch_size: int, eval_every: int) -> None:
        """Raise ValueError where a step of these sizes cannot roll out so."""
        if self.max_new_tokens > seq_length:
            raise ValueError(f"`rollout.max_new_tokens` {self.max_new_tokens} leaves a prompt "
                             f"no room in `train.seq_length` {seq_length}; lower the one or raise "
                             "the other")
        if self.adaptive is not None and not eval_every:
            raise ValueError("`rollout.adaptive` follows the validation loss; set `data.eval` and "
                             "`train.eval_every`")
        if self.adaptive is not None and self.adaptive.capacity < global_batch_size:
            raise ValueError(f"`rollout.adaptive.capacity` {self.adaptive.capacity} is less than a "
                             "batch; raise it to `train.global_batch_size` "
                             f"{global_batch_size} or more")
