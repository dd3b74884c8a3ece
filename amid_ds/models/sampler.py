"""Completions that a causal LM samples, many prompts at a time, whatever way its weights lie.

A loop of our own rather than transformers' `generate`: under tensor parallelism no rank has all logits, and random
numbers belong to a prompt (its seed) and not to the batch that it happens to be in, so that what is sampled does not
depend on ranks and batches but for the last digits of the logits. It knows temperature and top-p, one token that ends
a text, and models with keys and values to cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import TrainingError
from amid_ds.models.heads import body_of, logits_of, sharded_head_of

NO_TOKEN = -1      # in the place of a token that cannot be chosen


@dataclass(frozen=True)
class SamplerPrompt:
    """Ids to go on from (one at least), how many may follow, and the seed of the random numbers that choose them."""

    ids: list[int]
    room: int
    seed: int


@dataclass(frozen=True)
class Sampler:
    """How a model is sampled: over the ids below `vocab_size`, up to and with the token `end`.

    temperature 0 takes the most probable token. `shard`: this rank's rows of the head. `head(model)` is a context in
    which the head can be read.
    """

    temperature: float
    top_p: float
    end: int
    vocab_size: int
    shard: VocabShard | None = None
    head: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()

    @torch.no_grad()
    def complete(self, model: nn.Module, prompts: Sequence[SamplerPrompt], somebody: Callable[[bool], bool],
                 device: torch.device) -> list[list[int]]:
        """What `model` (in eval mode) adds to each prompt, the end token included where it came to it.

        `somebody(mine)` says whether any rank has something left to do: all ranks take as many steps, so they may
        share weights. One such agreement per token, and under tensor parallelism one sum of the logits. Raises
        TrainingError where logits are NaN or infinite, after the last step: other ranks are not left alone in theirs.
        """
        asked, prompts = prompts, prompts or [SamplerPrompt([self.end], 0, 0)]      # a rank that is through goes along
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(p.ids)) + p.ids for p in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
        last = torch.tensor([len(p.ids) + p.room - 2 for p in prompts], device=device)[:, None]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        chances = torch.zeros(len(prompts), max(1, *(p.room for p in prompts)))      # in [0, 1), one for each token
        for row, p in enumerate(prompts):
            chances[row, :p.room] = torch.rand(p.room, generator=torch.Generator().manual_seed(p.seed))
        found: list[list[int]] = [[] for _ in prompts]
        going, lost = [p.room > 0 for p in prompts], None
        run = _cached_body(model)
        while somebody(any(going)):
            hidden = run(ids, seen, positions)
            place = min(seen.shape[1] - longest, chances.shape[1] - 1)      # another rank may have further to go
            chosen = self.choose(self.logits(model, hidden), chances[:, place].to(device))
            for row, token in enumerate(chosen.tolist()):
                if going[row] and token == NO_TOKEN:
                    going[row], lost = False, (len(prompts[row].ids), len(found[row]))
                elif going[row]:
                    found[row].append(token)
                    going[row] = token != self.end and len(found[row]) < prompts[row].room
            ids = chosen.clamp(min=0)[:, None]
            seen = torch.cat([seen, torch.tensor(going, device=device).long()[:, None]], 1)
            positions = torch.minimum(positions[:, -1:] + 1, last.clamp(min=0))      # who has ended stays where he is
        if lost is not None:
            raise TrainingError(f"the model's logits after a prompt of {lost[0]} tokens and {lost[1]} of its own hold "
                                "NaN or infinity: no token can be sampled\n"
                                "  its weights are damaged, or too large for its dtype")
        return found[:len(asked)]

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """[B, H] -> the whole logits [B, vocab_size] in fp32, the same bits on every rank of the shard's group."""
        with self.head(model):
            own = logits_of(sharded_head_of(model, self.shard), hidden).float()
        if self.shard is None:
            return own[:, :self.vocab_size]
        whole = own.new_zeros(len(own), self.vocab_size)
        whole[:, self.shard.start:self.shard.stop] = own
        self.shard.add_up(whole)
        return whole

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """[B, V] and a number in [0, 1) for each row -> ids [B]; LOST where a row's logits are no distribution's (NaN,
        +inf, or -inf all of them).

        Top-p keeps the fewest tokens, the most probable first, that have a mass of at least top_p.
        """
        most, greedy = logits.max(-1)
        if self.temperature == 0:
            return torch.where(most.isfinite(), greedy, NO_TOKEN)
        mass = (logits.double() / self.temperature).softmax(-1)
        order = None
        if self.top_p < 1:
            mass, order = torch.sort(mass, dim=-1, descending=True, stable=True)
            mass = mass * (mass.cumsum(-1) - mass < self.top_p)
        heights = mass.cumsum(-1)
        place = torch.searchsorted(heights, uniform.double()[:, None] * heights[:, -1:], right=True)
        place = place.clamp(max=logits.shape[-1] - 1)      # beyond the last of NaN alone
        return torch.where(most.isfinite(), (place if order is None else order.gather(-1, place))[:, 0], NO_TOKEN)


def _cached_body(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(ids [B, n], which of all tokens so far count [B, N], positions [B, n]) -> hidden states of the last [B, H]; the
    keys and values of the tokens before are kept."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    body = body_of(model)
    placed = "position_ids" in inspect.signature(body.forward).parameters      # else it goes by the mask

    def run(ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        more: dict[str, Any] = {"position_ids": positions} if placed else {}
        out = body(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True, **more)
        return out.last_hidden_state[:, -1]

    return run
