"""Scores of generated text: ROUGE-L, diversity, and its likelihood under a teacher.

Every sample is drawn by transformers' own `generate` from its own seed (seed, batch of prompts),
and prompts are cut into the same batches on any number of ranks, so samples do not depend on the
ranks. The price: a short answer waits for the longest of its batch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from amid_ds.config.recipe import Source
from amid_ds.config.schedule import step_seed
from amid_ds.data import encode_prompts, read_prompts_with_references, vocabulary_size
from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.models.ends import end_ids
from amid_ds.models.shape import head_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_AT_ONCE = 32
# The seeds of MiniLLM's, DistiLLM's and AMiD's evaluation scripts; more go on with 60, 70, ...
PUBLISHED_SEEDS = (10, 20, 30, 40, 50)
# As in MiniLLM's Dist-4.
NGRAM = 4

# (prompts, answers) -> (Σ negative log-likelihood of the answers' tokens in nats, their number).
TeacherNLL = Callable[[Sequence[list[int]], Sequence[list[int]]], tuple[float, int]]
# Sampled ids by (seed, index of the prompt).
Samples = dict[tuple[int, int], list[int]]


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt's token ids, and the reference answers as text."""

    ids: list[int]
    references: list[str]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: one sample of at most `new_tokens` tokens per prompt and seed.

    no_repeat_ngram: no run of as many tokens comes twice in prompt and answer; 0: any may.
    """

    seeds: tuple[int, ...]
    new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class GenerationScores:
    """The scores of all samples.

    rouge_l: mean over the seeds of the mean F1 in [0, 1] against the best reference.
    rouge_l_std: the standard deviation over the seeds, divisor n, which is the papers' ±.
    rouge_l_sem: the standard error of the mean over the seeds, from the deviation of divisor n - 1;
    None with one seed.
    distinct_4: mean over the seeds of the share of different ones among all 4-grams of tokens.
    self_bleu: mean BLEU in [0, 1] of a sample against the other seeds' samples for the same prompt,
    low if they are diverse; None with one seed.
    teacher_nll: the teacher's mean negative log-likelihood of a sampled token in nats, low if it
    would write the same; None without a teacher.
    """

    rouge_l: float
    rouge_l_std: float
    rouge_l_sem: float | None
    distinct_4: float
    self_bleu: float | None
    teacher_nll: float | None


def require_rouge() -> Any:
    """The scorer of the papers' scripts: ROUGE-L with Porter's stemmer.

    Raises InputError if rouge-score is not installed.
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise InputError("the Python package rouge-score is not installed",
                         "it, to score generations with ROUGE-L",
                         "pip install 'rouge-score>=0.1.2', or leave generations out: "
                         "--seeds 0, in a recipe no `generate`") from None
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def read_eval_prompts(source: Source, on_bad_row: str, tokenizer: PreTrainedTokenizerBase,
                      rows: int | None, cut: Callable[[list[int]], list[int]]) -> list[EvalPrompt]:
    """The prompts of the source's first `rows` rows (None: of all), each as `cut` leaves its ids.
    """
    first = itertools.islice(read_prompts_with_references(source, on_bad_row), rows)
    texts, references = zip(*first, strict=True)
    return [EvalPrompt(cut(ids), answers)
            for ids, answers in zip(encode_prompts(tokenizer, texts), references, strict=True)]


def rouge_l_scores(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[EvalPrompt],
                   answers: Sequence[Sequence[int]]) -> list[float]:
    """The F1 in [0, 1] of each answer, ids without an end of text, against its best reference."""
    scorer = require_rouge()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [scorer.score_multi(prompt.references, text)["rougeL"].fmeasure
            for prompt, text in zip(prompts, texts, strict=True)]


def score_generations(model: nn.Module, tokenizer: PreTrainedTokenizerBase,
                      prompts: Sequence[EvalPrompt], sampling: Sampling,
                      teacher_nll: TeacherNLL | None, world: World | None = None
                      ) -> GenerationScores:
    """Sample for every prompt and seed, batches spread over the ranks; score on every rank.

    teacher_nll: None without a teacher. Collective: two of objects, at the end; world None: this
    process alone.
    """
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    batches = [range(start, min(start + PROMPTS_AT_ONCE, len(prompts)))
               for start in range(0, len(prompts), PROMPTS_AT_ONCE)]

    def sample_own_batches() -> tuple[Samples, float, int]:
        samples: Samples = {}
        nll_sum, tokens = 0.0, 0
        work = list(itertools.product(sampling.seeds, enumerate(batches)))[rank::size]
        for seed, (number, batch) in tqdm(work, desc="generate", leave=False,
                                          disable=True if rank else None):
            ids = [prompts[index].ids for index in batch]
            answers = sample_responses(model, tokenizer, ids, sampling, step_seed(seed, number, 0))
            samples.update({(seed, index): answer
                            for index, answer in zip(batch, answers, strict=True)})
            if teacher_nll is not None:
                batch_nll, batch_tokens = teacher_nll(ids, answers)
                nll_sum, tokens = nll_sum + batch_nll, tokens + batch_tokens
        return samples, nll_sum, tokens

    if world is None:
        by_rank = [sample_own_batches()]
    else:
        by_rank = world.gather(world.run_checked(sample_own_batches))
    samples = {key: answer for own, _, _ in by_rank for key, answer in own.items()}
    tokens = sum(count for _, _, count in by_rank)
    nll = sum(nll_sum for _, nll_sum, _ in by_rank) / tokens if teacher_nll and tokens else None
    return _score_samples(samples, tokenizer, prompts, sampling.seeds, nll)


@torch.inference_mode()
def sample_responses(model: nn.Module, tokenizer: PreTrainedTokenizerBase,
                     prompts: Sequence[list[int]], sampling: Sampling, seed: int
                     ) -> list[list[int]]:
    """One answer to each prompt, without its end of text, of ids below the tokenizer's size.

    Models are compared, so of a model's own generation_config only its ends of text are taken.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    own_config: Any = model.generation_config
    ends = end_ids(own_config, tokenizer)
    # Padding on the left: answers begin where the rows end.
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[ends[0]] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    ids = torch.tensor(rows, device=device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)
    unused = range(vocabulary_size(tokenizer), head_module(model).weight.shape[0])
    config = GenerationConfig(do_sample=True, temperature=sampling.temperature,
                              top_p=sampling.top_p, top_k=0, max_new_tokens=sampling.new_tokens,
                              no_repeat_ngram_size=sampling.no_repeat_ngram or None,
                              eos_token_id=list(ends), pad_token_id=ends[0],
                              suppress_tokens=list(unused) or None)
    torch.manual_seed(seed)
    # `generate` takes from the model's own config what its argument leaves unset: penalties, least
    # lengths.
    model.generation_config = config
    try:
        output = model.generate(ids, attention_mask=mask, generation_config=config)   # type: ignore[operator]
    finally:
        model.generation_config = own_config
    return [list(itertools.takewhile(lambda token: token not in ends, row))
            for row in output[:, longest:].tolist()]


def _score_samples(samples: Samples, tokenizer: PreTrainedTokenizerBase,
                   prompts: Sequence[EvalPrompt], seeds: Sequence[int], teacher_nll: float | None
                   ) -> GenerationScores:
    by_seed = {seed: [samples[seed, index] for index in range(len(prompts))] for seed in seeds}
    rouge_by_seed = [statistics.fmean(rouge_l_scores(tokenizer, prompts, answers))
                     for answers in by_seed.values()]
    standard_error = diversity = None
    if len(seeds) > 1:
        standard_error = statistics.stdev(rouge_by_seed) / math.sqrt(len(seeds))
        diversity = statistics.fmean(map(self_bleu, zip(*by_seed.values(), strict=True)))
    return GenerationScores(
        rouge_l=statistics.fmean(rouge_by_seed),
        rouge_l_std=statistics.pstdev(rouge_by_seed),
        rouge_l_sem=standard_error,
        distinct_4=statistics.fmean(distinct(answers, NGRAM) for answers in by_seed.values()),
        self_bleu=diversity,
        teacher_nll=teacher_nll)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of different ones among all n-grams of the texts; 0 if they have none."""
    grams = [tuple(text[start:start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[Sequence[int]]) -> float:
    """Mean BLEU in [0, 1] of each text against the others; an empty text counts as 0.

    Smoothed by adding 1 to the counts of n-grams longer than one.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method2
    scores = []
    for index, text in enumerate(texts):
        others = [*texts[:index], *texts[index + 1:]]
        bleu = sentence_bleu(others, text, smoothing_function=smooth) if text else 0.0
        scores.append(float(bleu))
    return statistics.fmean(scores)
