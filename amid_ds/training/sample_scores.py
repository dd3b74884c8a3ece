"""ROUGE-L during training: of responses that the student samples for evaluation sets' prompts.

In the engine that trains, however it is sharded. A prompt has random numbers of its own, the same
in every evaluation, so the score does not depend on the ranks. There is no ban of repeated n-grams,
as the published scripts have none when they validate. The price: all ranks wait for the longest
response of each pass.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from amid_ds.config.recipe import EvalSet, Generation, Recipe
from amid_ds.config.schedule import step_seed
from amid_ds.engine.engine import Engine
from amid_ds.eval.text_metrics import EvalPrompt, read_eval_prompts, rouge_l_scores
from amid_ds.models.sampler import SamplerPrompt
from amid_ds.training.sampling import EngineSampler
from amid_ds.training.validation import EvalMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SampleScores:
    """The scores of the sets that have `generate`. Made, and asked, by all ranks."""

    def __init__(self, recipe: Recipe, engine: Engine,
                 tokenizer: PreTrainedTokenizerBase) -> None:
        self.world, self.tokenizer = engine.world, tokenizer
        self.sets = {each.name: each.generate for each in recipe.data.eval
                     if each.generate is not None}
        self.samplers = {name: EngineSampler(engine, engine.distiller.student, tokenizer, generate)
                         for name, generate in self.sets.items()}
        # Nodes may see different files: rank 0 reads.
        self.prompts = self.world.run_on_main(
            lambda: {each.name: _prompts(recipe, each, tokenizer) for each in recipe.data.eval
                     if each.generate is not None}) if self.sets else {}

    def add_to(self, metrics: dict[str, EvalMetrics], before_pass: Callable[[], None]) -> None:
        """Add `rouge_l`, the mean F1 in [0, 1] against the best reference, to the sets' metrics.

        before_pass: called before each pass of the sampler. Collective.
        """
        for name, generate in self.sets.items():
            metrics[name]["rouge_l"] = self._rouge_l(name, generate, before_pass)

    def _rouge_l(self, name: str, generate: Generation, before_pass: Callable[[], None]) -> float:
        world, sampler = self.world, self.samplers[name]
        own = list(enumerate(self.prompts[name]))[world.dp_rank::world.dp_size]
        answers = sampler.answers(
            [SamplerPrompt(prompt.ids, generate.max_new_tokens, step_seed(generate.seed, number, 0))
             for number, prompt in own], before_pass)
        scores = rouge_l_scores(self.tokenizer, [prompt for _, prompt in own], answers)
        # Tensor-parallel peers have the same ones.
        by_rank = world.gather(scores if world.tp_rank == 0 else [])
        # A mean that does not depend on the order: that of `fsum`.
        return statistics.fmean(itertools.chain.from_iterable(by_rank))


def _prompts(recipe: Recipe, each: EvalSet, tokenizer: PreTrainedTokenizerBase) -> list[EvalPrompt]:
    """The set's prompts with their references; one too long for its row loses a side of it."""
    assert each.generate is not None
    source = recipe.data.parts()[f"eval/{each.name}"].train[0]
    longest = recipe.train.seq_length - each.generate.max_new_tokens
    kept = slice(longest) if each.truncate == "right" else slice(-longest, None)
    return read_eval_prompts(source, recipe.data.on_bad_row, tokenizer, each.generate.rows,
                             lambda ids: ids[kept])
