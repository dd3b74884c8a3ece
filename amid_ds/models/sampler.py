"""Completions that a causal LM samples, many prompts at a time, wherever its weights are.

A loop of its own rather than transformers' `generate`: under tensor parallelism no rank has all
logits, and random numbers belong to a prompt (its seed) and not to the batch that it happens to be
in, so ranks and batches change samples through the last digits of the logits alone. It supports
temperature and top-p, tokens that end a text, and models that cache keys and values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amid_ds.distributed.transfer import to_device
from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError, TrainingError
from amid_ds.models.heads import head_input, logits_of, sharded_head_of
from amid_ds.models.recurrence import recurrent_layers
from amid_ds.models.shape import body_of

# Instead of a token, if the logits are no distribution's.
NO_TOKEN = -1
# What a forward calls the argument in which layers keep what they know of earlier tokens.
CACHE_NAMES = {"cache", "past_key_values", "cache_params"}


@dataclass(frozen=True)
class SamplerPrompt:
    """Token ids to continue (one at least), the most tokens that may follow, and a random seed."""

    ids: list[int]
    room: int
    seed: int


@dataclass(frozen=True)
class Sampler:
    """Sampling settings: the ids below `vocab_size`, up to and including one of `ends`.

    temperature 0 takes the most probable token. shard: this rank's rows of the head; None: all.
    `head(model)` is a context in which the head can be read.
    """

    temperature: float
    top_p: float
    ends: tuple[int, ...]
    vocab_size: int
    shard: VocabShard | None = None
    head: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()

    @torch.no_grad()
    def complete(self, model: nn.Module, prompts: Sequence[SamplerPrompt],
                 any_rank: Callable[[bool], bool], device: torch.device) -> list[list[int]]:
        """The ids that `model` (in eval mode) adds to each prompt, the end included if it came.

        any_rank(own) is true if any rank has work left: all ranks take as many steps, so they may
        share weights. Collective: one `any_rank` per token, and under tensor parallelism one sum of
        the logits. Raises TrainingError if logits are NaN or infinite, after the last step, so that
        no other rank waits in a collective.
        """
        # A rank without prompts runs a dummy one: the collectives need every rank.
        rows = prompts or [SamplerPrompt([self.ends[0]], 0, 0)]
        ids, mask = _pad_left([prompt.ids for prompt in rows], device)
        longest = ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        last = torch.tensor([[max(len(prompt.ids) + prompt.room - 2, 0)] for prompt in rows],
                            device=device)
        uniform = to_device(_uniform_numbers(rows), device)
        completions: list[list[int]] = [[] for _ in rows]
        unfinished = [prompt.room > 0 for prompt in rows]
        not_finite: tuple[int, int] | None = None
        next_hidden = _cached_body(model)
        while any_rank(any(unfinished)):
            hidden = next_hidden(ids, mask, positions)
            # Other ranks may take more steps than this one has numbers for.
            step = min(mask.shape[1] - longest, uniform.shape[1] - 1)
            chosen = self.choose(self.logits(model, hidden), uniform[:, step])
            for row, token in enumerate(chosen.tolist()):
                if not unfinished[row]:
                    continue
                if token == NO_TOKEN:
                    unfinished[row] = False
                    not_finite = (len(rows[row].ids), len(completions[row]))
                else:
                    completions[row].append(token)
                    unfinished[row] = (token not in self.ends
                                       and len(completions[row]) < rows[row].room)
            ids = chosen.clamp(min=0)[:, None]
            counted = to_device(torch.tensor(unfinished).long()[:, None], device)
            mask = torch.cat([mask, counted], 1)
            # Finished rows repeat their last position.
            positions = torch.minimum(positions[:, -1:] + 1, last)
        if not_finite is not None:
            prompt_tokens, own_tokens = not_finite
            raise TrainingError(f"the model's logits after a prompt of {prompt_tokens} tokens and "
                                f"{own_tokens} of its own hold NaN or infinity: no token can be "
                                "sampled\n  its weights are damaged, or too large for its dtype")
        return completions[:len(prompts)]

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> all logits [B, vocab_size] in fp32, the same bits on every rank.

        One collective of the shard's group; none without a shard.
        """
        with self.head(model):
            local = logits_of(sharded_head_of(model, self.shard),
                              head_input(model, hidden)).float()
        if self.shard is None:
            return local[:, :self.vocab_size]
        logits = local.new_zeros(len(local), self.vocab_size)
        logits[:, self.shard.start:self.shard.stop] = local
        self.shard.add_up(logits)
        return logits

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits [B, V] and one number in [0, 1) per row [B] -> ids [B].

        NO_TOKEN if a row's logits are no distribution's: NaN, +inf, or all of them -inf. Top-p
        keeps the fewest tokens, the most probable first, that have a mass of at least top_p.
        """
        highest, greedy = logits.max(-1)
        if self.temperature == 0:
            return torch.where(highest.isfinite(), greedy, NO_TOKEN)
        mass = (logits.double() / self.temperature).softmax(-1)
        if torch.are_deterministic_algorithms_enabled():
            # On a GPU torch has no deterministic cumulative sum.
            mass, uniform = mass.cpu(), uniform.cpu()
        order = None
        if self.top_p < 1:
            mass, order = torch.sort(mass, dim=-1, descending=True, stable=True)
            mass = mass * (mass.cumsum(-1) - mass < self.top_p)
        cumulative = mass.cumsum(-1)
        threshold = uniform.double()[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, threshold, right=True)
        # A row of NaN would be searched to its end.
        index = index.clamp(max=logits.shape[-1] - 1)
        chosen = index if order is None else order.gather(-1, index)
        return torch.where(highest.isfinite(), chosen[:, 0].to(highest.device), NO_TOKEN)


def require_sampling_ranges(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise InputError for an option of `generate` and `chat` that no text can be sampled by."""
    for option, value, fits, expected in (
            ("--max-new-tokens", max_new_tokens, max_new_tokens > 0, "1 or more"),
            ("--temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
            ("--top-p", top_p, 0 < top_p <= 1, "in (0, 1]")):
        if not fits:
            raise InputError(f"{option} {value}", expected, f"give {option} such a number")


def _pad_left(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B, N], mask [B, N] with 0 at the padding); all prompts end in the last column."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _uniform_numbers(prompts: Sequence[SamplerPrompt]) -> Tensor:
    """Numbers in [0, 1) [B, most tokens that may follow]: row by row from the prompt's seed."""
    numbers = torch.zeros(len(prompts), max(1, *(prompt.room for prompt in prompts)))
    for row, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(prompt.seed)
        numbers[row, :prompt.room] = torch.rand(prompt.room, generator=generator)
    return numbers


def _cached_body(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function (new ids [B, n], mask of all tokens so far [B, N], positions [B, n]) -> hidden
    states of the last token [B, H]; what layers keep of earlier tokens is kept between calls.

    A model with layers that keep it in themselves, where no mask of the padding is heard, or in a
    cache of its own, runs on all tokens every time.
    """
    from transformers import DynamicCache

    body = body_of(model)
    arguments = inspect.signature(body.forward).parameters
    # Its name by transformers' version and by family; Mamba takes no other than its own.
    name = next((each for each in CACHE_NAMES if each in arguments), None)
    recurrent = recurrent_layers(model)
    if (name is None or not model._supports_default_dynamic_cache()   # type: ignore[operator]
            or any(CACHE_NAMES.isdisjoint(inspect.signature(layer.forward).parameters)
                   for layer in recurrent)):
        return _WholeRows(body)
    cache = DynamicCache(config=model.config)
    # Architectures without the argument derive positions from the mask.
    takes_positions = "position_ids" in arguments

    def next_hidden(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        optional = {"position_ids": positions} if takes_positions else {}
        if recurrent and not takes_positions:
            # Without attention nothing reads a mask of tokens that have gone: Mamba fails on one.
            mask = mask[:, -ids.shape[1]:]
        output = body(input_ids=ids, attention_mask=mask, use_cache=True,
                      **{name: cache}, **optional)
        return output.last_hidden_state[:, -1]

    return next_hidden


class _WholeRows:
    """As `_cached_body` with nothing kept but the ids: rows run whole, padded on the right."""

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self.ids: Tensor | None = None

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        order = mask.argsort(dim=1, descending=True, stable=True)
        states = self.body(input_ids=self.ids.gather(1, order), use_cache=False).last_hidden_state
        return states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
