"""Scores of a model on held-out rows: perplexity, divergence from its teacher, generated text.

Written independently of the fused loss, with both distributions in full for a few hundred tokens at
a time, so that it can verify the loss. Under a launcher each rank holds both models whole and
scores its share of the rows, so one device must hold them (training/validation.py scores larger
ones, in the engine).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from amid_ds.config.recipe import Dtype
from amid_ds.data import (
    Batch,
    load_tokenizer,
    prepare,
    read_batches,
    require_same_tokenizer,
    vocabulary_size,
)
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval.cached import (
    agreed_from,
    cache_to_score,
    kl_from,
    prepared_folder,
    require_same_rows,
    rows_to_score,
    with_cached_targets,
)
from amid_ds.eval.protocol import EvalArgs
from amid_ds.eval.text_metrics import read_eval_prompts, score_generations
from amid_ds.losses import IGNORE_INDEX
from amid_ds.models.adapter_folders import model_source
from amid_ds.models.fit import require_positions, require_rows
from amid_ds.models.heads import check_head, head_of, ids_to_check, logits_of, run_body
from amid_ds.models.loading import meta_model
from amid_ds.run.log import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
# By the name of a task or group: numbers by the name of a metric, `acc` and `acc_stderr`; None for
# one that is not finite.
TaskScores = dict[str, dict[str, float | None]]
# [256, V] fp32 logits of two models are 263 MB at V = 128256.
TOKENS_AT_ONCE = 256
# Of confidence, for the calibration error (Guo et al., 2017).
CALIBRATION_BINS = 15
# How long a rank waits for the others.
EVAL_TIMEOUT_S = 7200.0
# The positions of the sums that `sum_scores` returns; the bins of the calibration error follow.
NLL_SUM, KL_SUM, REVERSE_KL_SUM, AGREED_SUM, TOKEN_COUNT = range(5)
CONFIDENCE_SUMS = slice(5, 5 + CALIBRATION_BINS)
CORRECT_COUNTS = slice(5 + CALIBRATION_BINS, 5 + 2 * CALIBRATION_BINS)


@dataclass(frozen=True)
class Scores:
    """Token-weighted means over a data set, in nats; then the scores of generations, and of tasks.

    loss: negative log-likelihood; None where no data were scored, but tasks alone. perplexity: None
    if it is more than a float holds.
    kl_to_teacher: KL(teacher ‖ model); reverse_kl: KL(model ‖ teacher), None if it is infinite;
    top1_agreement: the share of tokens at which both have the same first choice; all three None
    without a teacher.
    calibration_error: the expected gap between the probability of the first choice and the share of
    right ones, over 15 bins of equal width. protocol: the published one that was followed, with
    its values; None without one. tasks: of benchmarks; None without any. The others are
    GenerationScores'; None without generations.
    """

    loss: float | None = None
    perplexity: float | None = None
    kl_to_teacher: float | None = None
    reverse_kl: float | None = None
    top1_agreement: float | None = None
    calibration_error: float | None = None
    rouge_l: float | None = None
    rouge_l_std: float | None = None
    rouge_l_sem: float | None = None
    distinct_4: float | None = None
    self_bleu: float | None = None
    teacher_nll: float | None = None
    protocol: str | None = None
    tasks: TaskScores | None = None

    def report(self) -> dict[str, Any]:
        """The scores by name, as JSON has them; `protocol` and `tasks` only where there are some.
        """
        return {name: value for name, value in dataclasses.asdict(self).items()
                if value is not None or name not in ("protocol", "tasks")}


def load_model(model: str, trust_remote_code: bool = False, dtype: Dtype = "auto") -> nn.Module:
    """A causal LM for evaluation, of a folder of adapters with them; dtype auto: that of its
    checkpoint. Raises InputError."""
    return model_source(model, trust_remote_code=trust_remote_code).load(dtype).eval()


def score_model(sums: Sequence[float], has_teacher: bool) -> Scores:
    """Scores from the sums of `sum_scores`, added up over all ranks.

    Raises InputError if there is no token to score, and TrainingError if the loss or KL(teacher ‖
    model) is infinite: the model gives a token, or one that the teacher may choose, no probability
    at all.
    """
    tokens = sums[TOKEN_COUNT]
    if not tokens:
        raise InputError("the data hold no token to score",
                         "at least one token after the first", "check the file")
    loss, kl, reverse_kl, agreement = (value / tokens for value in sums[:TOKEN_COUNT])
    if not math.isfinite(loss) or not math.isfinite(kl) or math.isnan(reverse_kl):
        raise TrainingError(
            f"over the data the loss is {loss}, KL(teacher ‖ model) {kl} and KL(model ‖ teacher) "
            f"{reverse_kl}\n  infinite: the model's logit is -inf for a token of the data, or for "
            "one that the teacher gives some probability")
    bins = zip(sums[CONFIDENCE_SUMS], sums[CORRECT_COUNTS], strict=True)
    gaps = sum(abs(confidence - correct) for confidence, correct in bins)
    return Scores(loss, perplexity(loss),
                  kl_to_teacher=kl if has_teacher else None,
                  reverse_kl=reverse_kl if has_teacher and math.isfinite(reverse_kl) else None,
                  top1_agreement=agreement if has_teacher else None,
                  calibration_error=gaps / tokens)


@torch.inference_mode()
def sum_scores(model: nn.Module, teacher: nn.Module | None, batches: Iterable[Batch],
               vocab_size: int) -> list[float]:
    """Sums over the labelled tokens, in nats, at the positions NLL_SUM to CORRECT_COUNTS.

    AGREED_SUM: tokens at which both models have the same first choice. A batch's cached targets
    stand for a teacher; they tell no REVERSE_KL_SUM. CONFIDENCE_SUMS: by bin of the first choice's
    probability, the sum of that probability; CORRECT_COUNTS: by the same bin, the number of right
    first choices. Without a teacher KL_SUM, REVERSE_KL_SUM and AGREED_SUM are 0. Raises
    TrainingError if a model's logits are NaN, or the model gives a token no probability that the
    data have or the teacher may choose.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(CORRECT_COUNTS.stop, dtype=torch.float64, device=device)
    for batch in (batch.to(device) for batch in batches):
        labels = batch.labels.flatten()
        keep = labels != IGNORE_INDEX
        labels = labels[keep]
        places = keep.nonzero()[:, 0]
        hidden = _hidden_states(model, batch, keep)
        teacher_hidden = None if teacher is None else _hidden_states(teacher, batch, keep)
        for start in range(0, len(labels), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            log_q = _log_probabilities(model, hidden[part], vocab_size)
            log_p = None
            sums[NLL_SUM] += F.nll_loss(log_q, labels[part], reduction="sum")
            confidence, choice = log_q.max(-1)
            if teacher is not None and teacher_hidden is not None:
                log_p = _log_probabilities(teacher, teacher_hidden[part], vocab_size)
                sums[KL_SUM] += _kl_sum(log_p, log_q)
                sums[REVERSE_KL_SUM] += _kl_sum(log_q, log_p)
                sums[AGREED_SUM] += (choice == log_p.argmax(-1)).sum()
            elif batch.teacher_targets is not None:
                targets = batch.teacher_targets.take(part)
                sums[KL_SUM] += kl_from(targets, log_q)
                sums[AGREED_SUM] += agreed_from(targets, choice)
            if not sums[[NLL_SUM, KL_SUM]].isfinite().all():
                _name_impossible(batch, places[part], labels[part], log_q, log_p)
            confidence = confidence.exp().double()
            bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
            sums[CONFIDENCE_SUMS].index_add_(0, bins, confidence)
            sums[CORRECT_COUNTS].index_add_(0, bins, (choice == labels[part]).double())
        sums[TOKEN_COUNT] += len(labels)
    values: list[float] = sums.tolist()
    return values


def _name_impossible(batch: Batch, places: torch.Tensor, labels: torch.Tensor, log_q: torch.Tensor,
                     log_p: torch.Tensor | None) -> None:
    """Raise TrainingError that names the first token without a probability where one is needed.

    places, labels: of the tokens, whose log-probabilities are log_q, log_p [n, V].
    """
    needed = F.one_hot(labels, log_q.shape[1]) > 0
    if log_p is not None:
        needed |= log_p > -math.inf
    for token, missing in (needed & (log_q == -math.inf)).nonzero()[:1].tolist():
        row, column = divmod(int(places[token]), batch.labels.shape[1])
        need = ("is the next of the data" if missing == labels[token] or log_p is None
                else f"has {log_p[token, missing].exp().item():.3g} of the teacher")
        where = f" of the row from {batch.sources[row]}" if batch.sources else ""
        raise TrainingError(f"after token {column + 1}{where} the model gives id {missing} no "
                            f"probability (a logit of -inf), and it {need}: the loss or the "
                            "divergence is infinite")


def _kl_sum(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """Σ KL(a ‖ b) of log-probabilities [N, V]: 0·log 0 is 0, and where b alone is 0, infinite."""
    ratio = (log_a - log_b).masked_fill(log_a == -math.inf, 0)
    return torch.where(ratio == math.inf, ratio, log_a.exp() * ratio).sum()


def _hidden_states(model: nn.Module, batch: Batch, keep: torch.Tensor) -> torch.Tensor:
    """The model's hidden states [tokens, H] at the tokens of the batch that `keep` marks."""
    return run_body(model, batch.input_ids, batch.positions,
                    batch.documents).flatten(0, 1)[keep]


def _log_probabilities(model: nn.Module, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Hidden states [N, H] -> log-probabilities [N, vocab_size] in fp32."""
    log_p = F.log_softmax(logits_of(head_of(model), hidden)[:, :vocab_size].float(), -1)
    if log_p.sum().isnan():
        raise TrainingError(f"logits of {model.name_or_path} hold NaN or infinity: there is "
                            "nothing to score\n"
                            "  its weights are damaged, or too large for its dtype")
    return log_p


def evaluate(args: EvalArgs, model: nn.Module, teacher: nn.Module | None,
             tokenizer: PreTrainedTokenizerBase, world: World | None = None) -> Scores:
    """Every score of `model`, on every rank.

    Over the ids below the tokenizer's size, both models renormalised over them. args.model and
    args.teacher are the models' names. args.cached: a cache stands for the teacher. Collective;
    world None: this process alone.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    data = agreed_on(world, lambda: rows_to_score(args))
    cache = agreed_on(world, lambda: cache_to_score(args, tokenizer))
    source = data.train[0]
    models = [(args.model, model), *([] if teacher is None else [(str(args.teacher), teacher)])]
    vocab_size = vocabulary_size(tokenizer)
    agreed_on(world, lambda: _check_heads(models, vocab_size))
    limits = [getattr(each.config, "max_position_embeddings", None) for _, each in models]
    seq_length = args.protocol.seq_length
    room = min([seq_length, *filter(None, limits)])
    protocol = agreed_on(world, lambda: args.protocol.on(source, room, args.data))
    sampling = agreed_on(world, lambda: protocol.sampling)
    # Each rank prepares all rows in a folder of its own: nodes may share no file system.
    with tempfile.TemporaryDirectory() as folder:
        rows = prepared_folder(args) or Path(folder) / "data"
        if prepared_folder(args) is None:
            agreed_on(world, lambda: prepare(data, seq_length, tokenizer, rows))
        agreed_on(world, lambda: require_same_rows(cache, rows, args.data))
        batches = list(read_batches(rows, args.batch_size, rank, size))
        agreed_on(world, lambda: _check_positions(models, batches))
        shown = with_cached_targets(
            tqdm(batches, desc="evaluate", leave=False, disable=True if rank else None), cache)
        sums = agreed_on(world, lambda: sum_scores(model, teacher, shown, vocab_size))
    scores = score_model(sums if world is None else world.sum(sums),
                         teacher is not None or cache is not None)
    if cache is not None:
        # The whole distribution would tell the one, and draws tell no first choice.
        agreement = None if cache.manifest.layout.sampled else scores.top1_agreement
        scores = dataclasses.replace(scores, reverse_kl=None, top1_agreement=agreement)
    if protocol.name is not None:
        scores = dataclasses.replace(scores, protocol=str(protocol))
    if sampling is None:
        return scores
    prompts = agreed_on(world, lambda: read_eval_prompts(
        source, args.rows.on_bad_row, tokenizer, protocol.prompts, protocol.cut))
    teacher_nll = None
    if teacher is not None:
        teacher_nll = partial(answers_nll, teacher, vocab_size=vocab_size)
    generations = score_generations(model, tokenizer, prompts, sampling, teacher_nll, world)
    return dataclasses.replace(scores, **dataclasses.asdict(generations))


def _check_heads(models: Sequence[tuple[str, nn.Module]], vocab_size: int) -> None:
    for name, model in models:
        check_head(model, f"the model {name}", ids_to_check(model, vocab_size),
                   lambda _: contextlib.nullcontext())


def _check_positions(models: Sequence[tuple[str, nn.Module]], batches: Sequence[Batch]) -> None:
    longest = max(batch.input_ids.shape[1] if batch.positions is None
                  else int(batch.positions.max()) + 1 for batch in batches)
    for name, model in models:
        require_positions(model, f"the model {name}", longest)


def agreed_on(world: World | None, work: Callable[[], _T]) -> _T:
    """What `work` returns, where it succeeds on every rank; world None: this process alone."""
    return work() if world is None else world.run_checked(work)


def answers_nll(model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[int]],
                vocab_size: int) -> tuple[float, int]:
    """(Σ negative log-likelihood of the answers' tokens after their prompts, in nats; tokens)."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[index, :len(row)] = torch.tensor(row)
        # Each token's label stands at the token before it.
        first = len(row) - len(answer) - 1
        labels[index, first:len(row) - 1] = torch.tensor(answer, dtype=torch.long)
    sums = sum_scores(model, None, [Batch(ids, labels, None, 0, [], [])], vocab_size)
    return sums[NLL_SUM], int(sums[TOKEN_COUNT])


def load_models(args: EvalArgs, device: torch.device
                ) -> tuple[nn.Module, nn.Module | None, PreTrainedTokenizerBase]:
    """(model, teacher, tokenizer) that `args` names, checked and on the device. Raises InputError.
    """
    trust, dtype = args.trust_remote_code, args.protocol.dtype
    tokenizer = load_tokenizer(args.model, trust_remote_code=trust)
    for name in filter(None, (args.model, args.teacher)):
        source = model_source(name, trust_remote_code=trust)
        require_rows(meta_model(source.model, **source.hub_kwargs), f"the model {name}",
                     vocabulary_size(tokenizer))
    teacher = None
    if args.teacher is not None:
        require_same_tokenizer(
            tokenizer, load_tokenizer(args.teacher, trust_remote_code=trust), args.model,
            args.teacher)
        teacher = load_model(args.teacher, trust, dtype).to(device)
    return load_model(args.model, trust, dtype).to(device), teacher, tokenizer


# heading -> (field of Scores, format).
SCORE_COLUMNS = {
    "perplexity": ("perplexity", "{:.2f}"), "KL to teacher": ("kl_to_teacher", "{:.4f}"),
    "reverse KL": ("reverse_kl", "{:.4f}"), "top-1 agreement": ("top1_agreement", "{:.1%}"),
    "calibration error": ("calibration_error", "{:.3f}"), "ROUGE-L": ("rouge_l", "{:.4f}"),
    "± standard deviation": ("rouge_l_std", "{:.4f}"),
    "± standard error": ("rouge_l_sem", "{:.4f}"),
    "distinct-4": ("distinct_4", "{:.3f}"), "self-BLEU": ("self_bleu", "{:.3f}"),
    "teacher's NLL": ("teacher_nll", "{:.3f}")}
# A file or a pipe has no width: wide enough for all columns.
PIPED_TABLE_WIDTH = 240


def print_table(scores: dict[str, Scores]) -> None:
    """Print the scores of models by their names, without the columns that no model has."""
    from rich.table import Table

    from amid_ds.run.console import PlainConsole

    protocols = {f"protocol {row.protocol}" for row in scores.values() if row.protocol}
    table = Table(title="held-out", caption="\n".join(protocols) or None)
    table.add_column("model")
    columns = {heading: (field, form) for heading, (field, form) in SCORE_COLUMNS.items()
               if any(getattr(row, field) is not None for row in scores.values())}
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, row in scores.items():
        values = [(getattr(row, field), form) for field, form in columns.values()]
        table.add_row(name, *("-" if value is None else form.format(value)
                              for value, form in values))
    console = PlainConsole()
    if not console.is_terminal:
        console.width = PIPED_TABLE_WIDTH
    console.print(table)
