"""What a model writes, judged: samples for prompts, their ROUGE-L, how much they differ, what a teacher thinks of them.

Every sample is drawn by transformers' own `generate` from a seed of its own (seed, batch of prompts), and prompts are
cut into the same batches on any number of ranks, so the samples do not depend on the ranks. The price is that a short
answer waits for the longest of its batch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from amid_ds.config.schedule import step_seed
from amid_ds.distributed.world import World
from amid_ds.errors import InputError

PROMPTS_AT_ONCE = 32
SEEDS = (10, 20, 30, 40, 50)      # those of MiniLLM's, DistiLLM's and AMiD's evaluation scripts; then 60, 70, …
NGRAM = 4                         # MiniLLM's Dist-4


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as ids, and what may be answered."""

    ids: list[int]
    references: list[str]


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: a run over all prompts for each of `seeds`, of at most `new_tokens` tokens each."""

    seeds: int
    new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def numbers(self) -> list[int]:
        return [10 * (number + 1) for number in range(self.seeds)]


@dataclass(frozen=True)
class GenerationScores:
    """The judgement. rouge_l: mean over the seeds of the mean F1 in [0, 1] against the best reference; its standard
    error over the seeds, None of a single one. distinct_4: the share of different ones among the 4-grams of tokens of
    a seed's samples. self_bleu: mean BLEU in [0, 1] of a sample against those of the other seeds for the same prompt,
    None of a single seed; low is diverse. teacher_nll: the teacher's mean negative log-likelihood of the tokens that
    were sampled, in nats, None without one; low is what the teacher would write."""

    rouge_l: float
    rouge_l_standard_error: float | None
    distinct_4: float
    self_bleu: float | None
    teacher_nll: float | None


def require_rouge() -> Any:
    """The scorer that the papers' scripts use: ROUGE-L with Porter's stemmer. InputError where it is not installed."""
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise InputError("the Python package rouge-score is not installed", "it, to score generations with ROUGE-L",
                         "pip install 'rouge-score>=0.1.2', or leave generations out with --seeds 0") from None
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


TeacherNLL = Callable[[Sequence[list[int]], Sequence[list[int]]], "tuple[float, int]"]


def score_generations(model: nn.Module, tokenizer: Any, prompts: Sequence[EvalPrompt], sampling: Sampling, opinion: TeacherNLL | None,
          world: World | None = None) -> GenerationScores:
    """Samples for every prompt and every seed, dealt over the ranks batch by batch, judged on every rank.

    opinion: the teacher's Σ negative log-likelihood of answers to prompts, and their tokens. Collective: one gathering,
    at the end; world None: this process alone.
    """
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    batches = [range(start, min(start + PROMPTS_AT_ONCE, len(prompts)))
               for start in range(0, len(prompts), PROMPTS_AT_ONCE)]

    def write() -> tuple[dict[tuple[int, int], list[int]], float, int]:
        answers, nll, tokens = {}, 0.0, 0
        work = list(itertools.product(sampling.numbers, enumerate(batches)))[rank::size]
        for seed, (number, batch) in tqdm(work, desc="generate", leave=False, disable=True if rank else None):
            asked = [prompts[index].ids for index in batch]
            drawn = sample_responses(model, tokenizer, asked, sampling, step_seed(seed, number, 0))
            answers.update({(seed, index): answer for index, answer in zip(batch, drawn, strict=True)})
            if opinion is not None:
                added, count = opinion(asked, drawn)
                nll, tokens = nll + added, tokens + count
        return answers, nll, tokens

    everyone = [write()] if world is None else world.gather(world.run_checked(write))
    samples = {key: answer for answers, *_ in everyone for key, answer in answers.items()}
    tokens = sum(count for *_, count in everyone)
    nll = sum(added for _, added, _ in everyone) / tokens if opinion is not None and tokens else None
    return _judged(samples, tokenizer, prompts, sampling.numbers, nll)


@torch.inference_mode()
def sample_responses(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling,
           seed: int) -> list[list[int]]:
    """One answer to each prompt, without its end-of-text, of ids below the tokenizer's size alone. Models are compared:
    nothing is taken from a model's own generation_config."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    longest = max(map(len, prompts))      # padding on the left: answers begin where the rows end
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    padding = range(len(tokenizer), model.config.vocab_size)   # type: ignore[union-attr, arg-type]
    config = GenerationConfig(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0,
                              max_new_tokens=sampling.new_tokens, eos_token_id=end, pad_token_id=end,
                              suppress_tokens=list(padding) or None)
    torch.manual_seed(seed)
    own: Any = model.generation_config      # what is not set is taken from there: penalties, least lengths
    model.generation_config = config
    try:
        out = model.generate(ids, attention_mask=mask, generation_config=config)   # type: ignore[operator]
    finally:
        model.generation_config = own
    return [list(itertools.takewhile(lambda token: token != end, row)) for row in out[:, ids.shape[1]:].tolist()]


def _judged(samples: dict[tuple[int, int], list[int]], tokenizer: Any, prompts: Sequence[EvalPrompt],
            seeds: Sequence[int], teacher_nll: float | None) -> GenerationScores:
    scorer = require_rouge()
    every = range(len(prompts))
    of_seed = []
    for seed in seeds:
        texts = tokenizer.batch_decode([samples[seed, index] for index in every], skip_special_tokens=True)
        of_seed.append(statistics.fmean(scorer.score_multi(prompts[index].references, text)["rougeL"].fmeasure
                                        for index, text in zip(every, texts, strict=True)))
    error = statistics.stdev(of_seed) / math.sqrt(len(of_seed)) if len(of_seed) > 1 else None
    return GenerationScores(
        statistics.fmean(of_seed), error,
        statistics.fmean(distinct([samples[seed, index] for index in every], NGRAM) for seed in seeds),
        statistics.fmean(self_bleu([samples[seed, index] for seed in seeds]) for index in every)
        if len(seeds) > 1 else None, teacher_nll)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of different ones among all n-grams of the texts; 0 where there is none."""
    grams = [tuple(text[place:place + n]) for text in texts for place in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[Sequence[int]]) -> float:
    """Mean BLEU of each text against the others, smoothed by adding 1 to the counts of n-grams longer than one."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method2
    return statistics.fmean(float(sentence_bleu([*texts[:place], *texts[place + 1:]], text, smoothing_function=smooth))
                            if text else 0.0 for place, text in enumerate(texts))
