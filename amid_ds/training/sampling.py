"""Responses of a model in the engine that trains, however its weights are sharded."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from amid_ds.config.recipe import Generation, Rollout
from amid_ds.data import vocabulary_size
from amid_ds.engine.engine import Engine
from amid_ds.models.delta import parts_of
from amid_ds.models.ends import end_ids
from amid_ds.models.sampler import Sampler, SamplerPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EngineSampler:
    """Samples from `model`, the engine's student or teacher, by the settings of a rollout or of an
    evaluation.

    end_of_text: the token that ends a response; None: the ends that model and tokenizer name, of a
    delta its teacher. vocab_size: the ids that may be said; None: the tokenizer's. Made, and
    called, by all ranks.
    """

    def __init__(self, engine: Engine, model: nn.Module, tokenizer: PreTrainedTokenizerBase,
                 settings: Rollout | Generation, end_of_text: str | None = None,
                 vocab_size: int | None = None) -> None:
        self.engine, self.model, self.batch_size = engine, model, settings.batch_size
        self.world = engine.world
        # Weights are gathered once per generation where they fit, else for each token.
        self.gather_once = engine.fits_gathered(model)
        own: Any = parts_of(model)[0].generation_config
        self.sampler = Sampler(settings.temperature, settings.top_p,
                               end_ids(own, tokenizer, end_of_text),
                               vocab_size or vocabulary_size(tokenizer),
                               engine.distiller.head.shard, self._readable_head)

    def complete(self, prompts: Sequence[SamplerPrompt],
                 before_pass: Callable[[], None] = lambda: None) -> list[list[int]]:
        """The model's responses to this rank's prompts, `batch_size` at once.

        Every rank makes as many passes, and as many steps in each; `before_pass` is called before
        each of them.
        """
        passes = -(-self.world.most(len(prompts)) // self.batch_size)
        responses: list[list[int]] = []
        gathered = (self.engine.gathered(self.model) if self.gather_once
                    else contextlib.nullcontext())
        with self.engine.evaluating(), gathered:
            for start in range(0, passes * self.batch_size, self.batch_size):
                before_pass()
                responses += self.world.run_checked(partial(
                    self.sampler.complete, self.model, prompts[start:start + self.batch_size],
                    self._any_rank_continues, self.world.device))
        return responses

    def answers(self, prompts: Sequence[SamplerPrompt],
                before_pass: Callable[[], None] = lambda: None) -> list[list[int]]:
        """`complete`, each response up to its end."""
        return [list(itertools.takewhile(lambda token: token not in self.sampler.ends, ids))
                for ids in self.complete(prompts, before_pass)]

    def _any_rank_continues(self, own: bool) -> bool:
        if not self.gather_once:
            # The gathers of one token are ZeRO-3's trace.
            self.engine.reset_prefetch()
        return self.world.sum([own])[0] > 0

    def _readable_head(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.gather_once else self.engine.gathered_head(model)
