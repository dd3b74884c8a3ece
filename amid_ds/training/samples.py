"""`train.samples`: what student and teacher answer to a few prompts, over the course of a run.

Answers take the most probable token each time, so they can be compared over the steps, and draw no
random number: a run with samples has the losses of one without. The price: in each evaluation all
ranks wait for at most NEW_TOKENS tokens of the student, and once of the teacher.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from amid_ds.config.recipe import Generation, MeanTeacher, Recipe
from amid_ds.data.encode import first_documents
from amid_ds.data.grown import GrownVocabulary
from amid_ds.data.pack import SourceDocument
from amid_ds.engine.engine import Engine
from amid_ds.models.sampler import SamplerPrompt
from amid_ds.run.log import Sample, read_samples
from amid_ds.training.sampling import EngineSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The longest answer; no more than half of a row.
NEW_TOKENS = 64
# The beginning of a plain text that is a prompt; no more than half of the text.
TEXT_TOKENS = 32


class SampleAnswers:
    """The answers to the recipe's `train.samples` prompts. Made, and asked, by all ranks.

    The teacher answers in the first evaluation of a run, the student's running mean, which changes,
    in each. A cached teacher answers nothing.
    """

    def __init__(self, recipe: Recipe, engine: Engine, tokenizer: PreTrainedTokenizerBase,
                 grown: GrownVocabulary | None = None) -> None:
        self.world, self.tokenizer, self.grown = engine.world, tokenizer, grown
        self.new_tokens = min(NEW_TOKENS, recipe.train.seq_length // 2)
        self.most_prompt_tokens = recipe.train.seq_length - self.new_tokens
        self.teacher_changes = isinstance(recipe.teacher, MeanTeacher)
        self.prompts: list[list[int]] = []
        # The teacher's answers, on rank 0; those of which prompts it still has to give.
        self.of_teacher: dict[int, str] = {}
        self.unasked: list[int] = []
        if not recipe.train.samples:
            return
        # Nodes may see different files: rank 0 reads.
        self.prompts, self.of_teacher = self.world.run_on_main(
            lambda: self._prompts_and_known_answers(recipe))
        settings = Generation(max_new_tokens=self.new_tokens, temperature=0.0)
        student, teacher = engine.distiller.student, engine.distiller.teacher
        self.student = EngineSampler(engine, student, tokenizer, settings)
        if teacher is not None:
            self.teacher = EngineSampler(engine, teacher, tokenizer, settings,
                                         vocab_size=None if grown is None else grown.old)
            self.unasked = [number for number in range(len(self.prompts))
                            if number not in self.of_teacher]

    def answer(self, before_pass: Callable[[], None]) -> list[Sample]:
        """Every prompt with its answers, on rank 0; on the others none. Collective.

        before_pass: called before each pass of a sampler. Raises TrainingError where a model's
        logits are NaN.
        """
        if not self.prompts:
            return []
        began = time.monotonic()
        if self.unasked:
            self.of_teacher |= self._answers(self.teacher, self.unasked, before_pass)
            if not self.teacher_changes:
                self.unasked = []
        of_student = self._answers(self.student, range(len(self.prompts)), before_pass)
        if not self.world.is_main:
            return []
        logger.info("%d prompt(s) answered in %.1f s", len(self.prompts), time.monotonic() - began)
        return [Sample(number, self._text(prompt), of_student[number], self.of_teacher.get(number))
                for number, prompt in enumerate(self.prompts)]

    def _prompts_and_known_answers(self, recipe: Recipe) -> tuple[list[list[int]], dict[int, str]]:
        """The prompts, and the teacher's answers of an earlier attempt, by the prompt's number."""
        prompts = sample_prompts(recipe, self.tokenizer, self.most_prompt_tokens)
        if len(prompts) < recipe.train.samples:
            logger.info("train.samples is %d, and data.eval has %d prompt(s)",
                        recipe.train.samples, len(prompts))
        other_teacher = any(key.partition(".")[0] == "teacher"
                            for key in recipe.checkpoint.allow_change)
        if self.teacher_changes or other_teacher:
            return prompts, {}
        known = {(line["number"], line["prompt"]): line["teacher"]
                 for line in read_samples(Path(recipe.output_dir)) if line["teacher"] is not None}
        keys = {number: (number, self._text(prompt)) for number, prompt in enumerate(prompts)}
        return prompts, {number: known[key] for number, key in keys.items() if key in known}

    def _answers(self, sampler: EngineSampler, numbers: Sequence[int],
                 before_pass: Callable[[], None]) -> dict[int, str]:
        """The model's answers to the prompts of these numbers, on rank 0."""
        world = self.world
        own = numbers[world.dp_rank::world.dp_size]
        answers = sampler.answers(
            [SamplerPrompt(self._as_read_by(sampler.model, self.prompts[number]), self.new_tokens,
                           seed=0) for number in own], before_pass)
        # Tensor-parallel peers have the same ones.
        by_rank = world.collect(list(zip(own, answers, strict=True)) if world.tp_rank == 0 else [])
        return {number: self._text(ids)
                for number, ids in itertools.chain(*by_rank or ())}

    def _as_read_by(self, model: nn.Module, prompt: list[int]) -> list[int]:
        """The prompt's ids: to a teacher without the student's new tokens, these in pieces."""
        if self.grown is None or model is self.student.model:
            return prompt
        return list(itertools.chain(*map(self.grown.spelled, prompt)))[-self.most_prompt_tokens:]

    def _text(self, ids: list[int]) -> str:
        try:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        except Exception as error:
            # E.g. of an id that is no token: no reason to end a run.
            logger.warning("the tokenizer cannot write %s as text: %s", ids, error)
            return f"{ids}"


def sample_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, most_tokens: int
                   ) -> list[list[int]]:
    """The ids of the first `train.samples` prompts of the evaluation sets, a set's row in turn.

    A row's prompt ends where its last response begins; of a plain text it is the beginning. One of
    more than `most_tokens` loses the side that the set's `truncate` says. Raises InputError for a
    row that cannot be used.
    """
    count, parts = recipe.train.samples, recipe.data.parts()
    by_set = []
    for each in recipe.data.eval:
        kept = slice(most_tokens) if each.truncate == "right" else slice(-most_tokens, None)
        documents = first_documents(parts[f"eval/{each.name}"], recipe.train.seq_length, tokenizer)
        prompts = (_prompt_of(document, each.is_text)[kept] for document in documents
                   if document.is_start)
        by_set.append(list(itertools.islice(filter(None, prompts), count)))
    in_turn = itertools.chain(*itertools.zip_longest(*by_set))
    return [prompt for prompt in in_turn if prompt is not None][:count]


def _prompt_of(document: SourceDocument, is_text: bool) -> list[int]:
    """The ids before the document's last response, or the first ids of a plain text."""
    if is_text:
        # Without the end of the text, which is the last segment.
        ids = [token for segment, _ in document.segments[:-1] for token in segment]
        return ids[:min(TEXT_TOKENS, -(-len(ids) // 2))]
    tokens = [(token, learnt) for segment, learnt in document.segments for token in segment]
    while tokens and not tokens[-1][1]:
        tokens.pop()
    while tokens and tokens[-1][1]:
        tokens.pop()
    return [token for token, _ in tokens]
