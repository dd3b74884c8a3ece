"""How good is a model on held-out text, and how near to its teacher? One process, plain transformers models.

Written apart from the fused loss, with both distributions in full for a few hundred tokens at a time, so that it can
serve as a second opinion on it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from amid_ds.config import Data, Source
from amid_ds.data import Batch, load_tokenizer, prepare, read_rows, require_same_tokenizer
from amid_ds.distiller import head_of, logits_of, run_body
from amid_ds.engine import model_config
from amid_ds.errors import InputError

TOKENS_AT_ONCE = 256      # [256, V] fp32 logits of two models: 263 MB at V = 128256


@dataclass(frozen=True)
class Scores:
    """Token-weighted means over a data set. `kl_to_teacher` is KL(teacher ‖ model) in nats, `top1_agreement` the share
    of tokens where both have the same first choice; None without a teacher. `rouge_l` is None: nothing is generated."""

    loss: float
    perplexity: float
    kl_to_teacher: float | None
    top1_agreement: float | None
    rouge_l: float | None = None


def load_model(model: str) -> nn.Module:
    """A causal LM for evaluation, in the dtype of its checkpoint."""
    from transformers import AutoModelForCausalLM

    model_config(model)      # one clear error where there is none
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()


@torch.inference_mode()
def evaluate(model: nn.Module, teacher: nn.Module | None, batches: Iterable[Batch], vocab_size: int) -> Scores:
    """Score `model` over the ids below `vocab_size`, both models renormalised over them."""
    nll = kl = agreed = 0.0
    tokens = 0
    for batch in batches:
        keep = batch.labels.flatten() != -100
        labels = batch.labels.flatten()[keep]
        hidden = [None if m is None else run_body(m, batch.input_ids, batch.positions).flatten(0, 1)[keep]
                  for m in (model, teacher)]
        for start in range(0, len(labels), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            log_q = _log_probabilities(model, hidden[0][part], vocab_size)   # type: ignore[index]
            nll += F.nll_loss(log_q, labels[part], reduction="sum").item()
            if teacher is not None:
                log_p = _log_probabilities(teacher, hidden[1][part], vocab_size)   # type: ignore[index]
                kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
                agreed += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
        tokens += len(labels)
    if not tokens:
        raise InputError("the data hold no token to score", "at least one token after the first", "check the file")
    loss = nll / tokens
    return Scores(loss, math.exp(loss), kl / tokens if teacher is not None else None,
                  agreed / tokens if teacher is not None else None)


def _log_probabilities(model: nn.Module, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return F.log_softmax(logits_of(head_of(model), hidden)[:, :vocab_size].float(), -1)


def score_file(model: nn.Module, teacher: nn.Module | None, tokenizer: Any, path: str, seq_length: int,
               batch_size: int = 4) -> Scores:
    """Scores on every row of a local file (jsonl with `text`, or with `prompt` and `response`; or txt)."""
    data = Data(train=[_source(path)])
    with tempfile.TemporaryDirectory() as folder:
        prepare(data, seq_length, tokenizer, Path(folder) / "data")
        batches = list(read_rows(Path(folder) / "data", batch_size))
        return evaluate(model, teacher, tqdm(batches, desc="evaluate", leave=False, disable=None), len(tokenizer))


def _source(path: str) -> Source:
    """How to read `path`: by the columns of its first row."""
    try:
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline()) if path.endswith(".jsonl") else {}
    except (OSError, ValueError):
        row = {}      # said, with the line, by the data room
    if isinstance(row, dict) and "text" not in row and {"prompt", "response"} <= row.keys():
        return Source(path=path, prompt="prompt", response="response")
    return Source(path=path)


def evaluate_command(model: str, teacher: str | None, path: str, seq_length: int, as_json: bool) -> None:
    """`amid-ds eval`: print the scores, as a table or as JSON alone."""
    tokenizer = load_tokenizer(model)
    if teacher is not None:
        require_same_tokenizer(tokenizer, load_tokenizer(teacher), model, teacher)
    scores = score_file(load_model(model), load_model(teacher) if teacher else None, tokenizer, path, seq_length)
    if as_json:
        print(json.dumps(dataclasses.asdict(scores)))
    else:
        print_table({model: scores})


def print_table(scores: dict[str, Scores]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out")
    for title in ("model", "perplexity", "KL to teacher", "top-1 agreement"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, row in scores.items():
        table.add_row(name, f"{row.perplexity:.2f}", "-" if row.kl_to_teacher is None else f"{row.kl_to_teacher:.4f}",
                      "-" if row.top1_agreement is None else f"{row.top1_agreement:.1%}")
    Console().print(table)
