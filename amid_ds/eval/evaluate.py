"""How good is a model on held-out rows, how near to its teacher, and what does it write? Plain transformers models.

Written apart from the fused loss, with both distributions in full for a few hundred tokens at a time, so that it can
serve as a second opinion on it. Under a launcher each rank holds both models whole and takes its share of the rows: no
model is evaluated here that one device cannot hold (validation.py scores those, in the engine).
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.config.recipe import Data, Source
from amid_ds.data import (
    Batch,
    answered_prompts_of,
    load_tokenizer,
    prepare,
    prompt_ids,
    read_rows,
    require_same_tokenizer,
)
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError, suggest
from amid_ds.eval.text_metrics import SEEDS, EvalPrompt, Sampling, require_rouge, score_generations
from amid_ds.losses.fused import IGNORE_INDEX
from amid_ds.models.heads import head_of, logits_of, run_body
from amid_ds.models.loading import model_config
from amid_ds.run.log import perplexity

TOKENS_AT_ONCE = 256      # [256, V] fp32 logits of two models: 263 MB at V = 128256
CALIBRATION_BINS = 15                 # of confidence, for the calibration error (Guo et al., 2017)
EVAL_TIMEOUT_S = 7200.0        # how long a rank waits for the others


@dataclass(frozen=True)
class Scores:
    """Token-weighted means over a data set, in nats. `kl_to_teacher` is KL(teacher ‖ model), `reverse_kl` is
    KL(model ‖ teacher), `top1_agreement` the share of tokens where both have the same first choice; None without a
    teacher. `calibration_error`: the expected gap between the probability of the first choice and how often it is
    right, over 15 bins of equal width. Then what `writing.Written` says of generations; None where there are none."""

    loss: float
    perplexity: float | None      # None: more than a float holds
    kl_to_teacher: float | None
    reverse_kl: float | None
    top1_agreement: float | None
    calibration_error: float
    rouge_l: float | None = None
    rouge_l_standard_error: float | None = None
    distinct_4: float | None = None
    self_bleu: float | None = None
    teacher_nll: float | None = None


def load_model(model: str) -> nn.Module:
    """A causal LM for evaluation, in the dtype of its checkpoint."""
    from transformers import AutoModelForCausalLM

    model_config(model)      # one clear error where there is none
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()


def score_model(sums: Sequence[float], taught: bool) -> Scores:
    """Sums as `sums_of` makes them, of all ranks, as means. Raises InputError where there is no token to score, and
    TrainingError where a mean is infinite: a token, or what the other model may say, has no probability at all."""
    nll, kl, reverse, agreed, tokens, *bins = sums
    if not tokens:
        raise InputError("the data hold no token to score", "at least one token after the first", "check the file")
    if not all(map(math.isfinite, sums)):
        raise TrainingError(f"over the data the loss is {nll / tokens}, KL(teacher ‖ model) {kl / tokens} and "
                            f"KL(model ‖ teacher) {reverse / tokens}")
    loss = nll / tokens
    gaps = sum(abs(sure - right) for sure, right in zip(bins[:CALIBRATION_BINS], bins[CALIBRATION_BINS:], strict=True))
    near = [value / tokens if taught else None for value in (kl, reverse, agreed)]
    return Scores(loss, perplexity(loss), near[0], near[1], near[2], gaps / tokens)


@torch.inference_mode()
def sum_scores(model: nn.Module, teacher: nn.Module | None, batches: Iterable[Batch], vocab_size: int) -> list[float]:
    """Sums over the labelled tokens: negative log-likelihood, KL(teacher ‖ model), KL(model ‖ teacher), tokens where
    both have the same first choice, tokens; by bin of its probability, that probability, and whether it was right.
    Raises TrainingError where a model's logits are NaN."""
    device = next(model.parameters()).device
    sums = torch.zeros(5 + 2 * CALIBRATION_BINS, dtype=torch.float64, device=device)
    for batch in (batch.to(device) for batch in batches):
        labels = batch.labels.flatten()
        keep = labels != IGNORE_INDEX
        labels = labels[keep]
        hidden = [None if m is None else run_body(m, batch.input_ids, batch.positions).flatten(0, 1)[keep]
                  for m in (model, teacher)]
        for start in range(0, len(labels), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            log_q = _log_probabilities(model, hidden[0][part], vocab_size)   # type: ignore[index]
            sums[0] += F.nll_loss(log_q, labels[part], reduction="sum")
            sure, choice = log_q.max(-1)
            if teacher is not None:
                log_p = _log_probabilities(teacher, hidden[1][part], vocab_size)   # type: ignore[index]
                sums[1] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
                sums[2] += F.kl_div(log_p, log_q, reduction="sum", log_target=True)
                sums[3] += (choice == log_p.argmax(-1)).sum()
            sure = sure.exp().double()
            place = (sure * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
            sums[5:5 + CALIBRATION_BINS].index_add_(0, place, sure)
            sums[5 + CALIBRATION_BINS:].index_add_(0, place, (choice == labels[part]).double())
        sums[4] += len(labels)
    found: list[float] = sums.tolist()
    return found


def _log_probabilities(model: nn.Module, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
    log_p = F.log_softmax(logits_of(head_of(model), hidden)[:, :vocab_size].float(), -1)
    if log_p.sum().isnan():
        raise TrainingError(f"logits of {model.name_or_path} hold NaN or infinity: there is nothing to score\n"
                            "  its weights are damaged, or too large for its dtype")
    return log_p


@dataclass(frozen=True)
class EvalArgs:
    """What `amid-ds eval` is asked. `seeds` None: as many as the papers draw, where the rows have prompts."""

    model: str
    teacher: str | None
    data: str
    seq_length: int = 512
    template: str | None = None
    seeds: int | None = None
    new_tokens: int | None = None      # None: half of what prompt and answer have
    batch_size: int = 4

    def sampling(self, source: Source, room: int) -> Sampling | None:
        """How to generate for the source's rows, prompt and answer together within `room` tokens; None: not at all.
        Raises InputError where that cannot be done."""
        seeds = self.seeds if self.seeds is not None else 0 if source.is_text else len(SEEDS)
        new_tokens = room // 2 if self.new_tokens is None else self.new_tokens
        if seeds and source.is_text:
            raise InputError(f"--seeds {seeds} with {self.data}, whose rows have no prompt and no reference",
                             "prompt and response, or instruction, input and output: ROUGE-L compares with these",
                             "give such a file, or leave --seeds out")
        if seeds < 0 or not 0 < new_tokens < room:
            raise InputError(f"--seeds {seeds} --new-tokens {new_tokens}",
                             f"at least 0 seeds, and from 1 to {room - 1} new tokens, room for a prompt",
                             "change --seeds, --new-tokens or --seq-length")
        if not seeds:
            return None
        require_rouge()
        return Sampling(seeds, new_tokens)


def evaluate(question: EvalArgs, model: nn.Module, teacher: nn.Module | None, tokenizer: Any,
             world: World | None = None) -> Scores:
    """Every score of `model`, over the ids below the tokenizer's size, both models renormalised over them. Collective;
    world None: this process alone."""
    together: Any = (lambda work: work()) if world is None else world.run_checked
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    source: Source = together(lambda: eval_source(question.data, question.template))
    limits = [getattr(m.config, "max_position_embeddings", None) for m in (model, teacher) if m is not None]
    room = min([question.seq_length, *filter(None, limits)])
    sampling: Sampling | None = together(lambda: question.sampling(source, room))
    with tempfile.TemporaryDirectory() as folder:      # each rank its own: nodes may share none
        rows = Path(folder) / "data"
        together(lambda: prepare(Data(train=[source]), question.seq_length, tokenizer, rows))
        batches = tqdm(list(read_rows(rows, question.batch_size, rank, size)), desc="evaluate", leave=False,
                       disable=True if rank else None)
        sums = together(lambda: sum_scores(model, teacher, batches, len(tokenizer)))
    scores = score_model(sums if world is None else world.sum(sums), teacher is not None)
    if sampling is None:
        return scores
    prompts: list[EvalPrompt] = together(lambda: _prompts(source, tokenizer, room - sampling.new_tokens))
    opinion = None if teacher is None else lambda asked, answers: mean_nll(teacher, asked, answers, len(tokenizer))
    return dataclasses.replace(scores, **dataclasses.asdict(score_generations(model, tokenizer, prompts, sampling, opinion, world)))


def _prompts(source: Source, tokenizer: Any, longest: int) -> list[EvalPrompt]:
    """The source's prompts; one longer than `longest` loses its left."""
    texts, references = zip(*answered_prompts_of(source, "error"), strict=True)
    encoded = prompt_ids(tokenizer, texts)
    return [EvalPrompt(ids[-longest:], answers) for ids, answers in zip(encoded, references, strict=True)]


def mean_nll(model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[int]],
               vocab_size: int) -> tuple[float, int]:
    """(Σ negative log-likelihood of the answers' tokens after their prompts, their number)."""
    rows = [[*asked, *answer] for asked, answer in zip(prompts, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[place, :len(row)] = torch.tensor(row)
        labels[place, len(row) - len(answer) - 1:len(row) - 1] = torch.tensor(answer, dtype=torch.long)
    sums = sum_scores(model, None, [Batch(ids, labels, None, 0, [], [])], vocab_size)
    return sums[0], int(sums[4])


def eval_source(path: str, template: str | None = None) -> Source:
    """How to read a file: by the columns of its first row. Instructions go through `template`, by default the first."""
    try:
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline()) if path.endswith(".jsonl") else {}
    except (OSError, ValueError):
        row = {}      # said, with the line, by the data room
    columns = row.keys() if isinstance(row, dict) else set()
    if template is not None or ("text" not in columns and {"instruction", "output"} <= columns):
        name = template or next(iter(TEMPLATES))
        if name not in TEMPLATES:
            raise InputError(f"the prompt template {name!r}", f"one of {', '.join(TEMPLATES)}",
                             suggest(name, TEMPLATES))
        return Source(path=path, template=name)
    if "text" not in columns and {"prompt", "response"} <= columns:
        return Source(path=path, prompt="prompt", response="response")
    return Source(path=path)


def evaluate_command(question: EvalArgs, as_json: bool) -> None:
    """`amid-ds eval`: rank 0 prints the scores, as a table or as JSON alone."""
    with init_distributed(EVAL_TIMEOUT_S) as world:
        model, teacher, tokenizer = world.run_checked(lambda: _load(question, world.device))
        scores = evaluate(question, model, teacher, tokenizer, world)
        if world.is_main and as_json:
            print(json.dumps(dataclasses.asdict(scores)))
        elif world.is_main:
            print_table({question.model: scores})


def _load(question: EvalArgs, device: torch.device) -> tuple[nn.Module, nn.Module | None, Any]:
    tokenizer = load_tokenizer(question.model)
    if question.teacher is not None:
        require_same_tokenizer(tokenizer, load_tokenizer(question.teacher), question.model, question.teacher)
    teacher = load_model(question.teacher).to(device) if question.teacher is not None else None
    return load_model(question.model).to(device), teacher, tokenizer


COLUMNS = {      # heading -> how a score is shown, where it is known
    "perplexity": ("perplexity", "{:.2f}"), "KL to teacher": ("kl_to_teacher", "{:.4f}"),
    "reverse KL": ("reverse_kl", "{:.4f}"), "top-1 agreement": ("top1_agreement", "{:.1%}"),
    "calibration error": ("calibration_error", "{:.3f}"), "ROUGE-L": ("rouge_l", "{:.4f}"),
    "± standard error": ("rouge_l_standard_error", "{:.4f}"), "distinct-4": ("distinct_4", "{:.3f}"),
    "self-BLEU": ("self_bleu", "{:.3f}"), "teacher's NLL": ("teacher_nll", "{:.3f}")}


def print_table(scores: dict[str, Scores]) -> None:
    """Models by their names; columns that no model has are left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out")
    table.add_column("model")
    shown = {heading: how for heading, how in COLUMNS.items()
             if any(getattr(row, how[0]) is not None for row in scores.values())}
    for heading in shown:
        table.add_column(heading, justify="right")
    for name, row in scores.items():
        values = [(getattr(row, field), form) for field, form in shown.values()]
        table.add_row(name, *("-" if value is None else form.format(value) for value, form in values))
    console = Console()
    if not console.is_terminal:      # a file or a pipe is as wide as the table
        console.width = 240
    console.print(table)
