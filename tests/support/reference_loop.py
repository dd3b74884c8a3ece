"""The training that a recipe describes, written in plain transformers and torch."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from amid_ds.data import PreparedLoader
from support.data import split_documents
from support.families import plain_model


def reference_adamw(model: nn.Module, train: dict) -> torch.optim.Optimizer:
    """torch's AdamW, which decays matrices that are no embedding, or with decay_all everything."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        is_embedding = re.search(r"embed_tokens|\bwte\b|\bwpe\b", name)
        groups[train.get("decay_all", False)
               or (parameter.dim() > 1 and not is_embedding)].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": train.get("weight_decay", 0.1) * decayed}
         for decayed, parameters in groups.items() if parameters],
        betas=tuple(train.get("betas", (0.9, 0.95))), eps=train.get("eps", 1e-8))


def reference_factor(train: dict, step: int) -> float:
    """The share of the peak learning rate in optimizer step `step` (from 0)."""
    warm, schedule = train["warmup_steps"], train.get("schedule", "cosine")
    if step < warm:
        return (step + 1) / warm
    way = train["steps"] - warm
    if schedule == "wsd":
        way, schedule = train["decay_steps"], train.get("decay_shape", "linear")
    # 1 before the way down has begun.
    ahead = torch.tensor(min(1, (train["steps"] - step) / way), dtype=torch.float64)
    height = {"constant": torch.ones(()), "linear": ahead, "sqrt": 1 - torch.sqrt(1 - ahead),
              "cosine": torch.sin(torch.pi / 2 * ahead) ** 2}[schedule].item()
    low = train.get("min_lr_ratio", 0.0)
    return low * (1 - height) + height


# Sums of the divergence and the cross entropy of a document's n labelled tokens, from the student's
# log q [n, V] of them, its ids [1, L], which of the L are labelled, their labels [n], the teacher's
# logits of ids, and λ.
DocumentLosses = Callable[..., tuple[Tensor, Tensor]]


def skewed_losses(log_q: Tensor, ids: Tensor, keep: Tensor, labels: Tensor,
                  guide: Callable[[Tensor], Tensor], lam: float) -> tuple[Tensor, Tensor]:
    """KL(p ‖ λ p + (1 - λ) q), and the cross entropy."""
    with torch.no_grad():
        log_p = guide(ids)[0, keep, :log_q.shape[1]].double().log_softmax(-1)
    log_r = torch.log(lam * log_p.exp() + (1 - lam) * log_q.exp())
    return (log_p.exp() * (log_p - log_r)).sum(), F.nll_loss(log_q, labels, reduction="sum")


def reference_loop(student: Path, teacher: Path | Callable[[Tensor], Tensor] | None, recipe: dict,
                   prepared: Path,
                   make_optimizer: Callable[[nn.Module, dict], torch.optim.Optimizer]
                   = reference_adamw, of_document: DocumentLosses | None = None
                   ) -> tuple[list[dict], dict[str, Tensor]]:
    """Each step's metrics and the trained fp32 weights, or with `train.ema` their running mean: the
    truth for any layout.

    One process, full logits in float64, one document at a time; the skewed KL and the schedules
    written out. teacher: a model, or its logits [1, L, V] of ids [1, L]; None: the student's
    running mean, of `teacher.ema`. make_optimizer: from the model and the recipe's `train`; its
    groups' `ratio` multiplies the learning rate. of_document: other losses than these.
    """
    model, guide = plain_model(student), teacher
    train, loss = recipe["train"], recipe["loss"]
    optimizer = make_optimizer(model, train)
    # After the optimizer, which may have given the model its adapters.
    kept = copy.deepcopy(model)
    means = [(kept, train.get("ema") or 0.0)]
    if teacher is None or isinstance(teacher, Path):
        loaded = plain_model(teacher or student)
        if teacher is None:
            means.append((loaded, recipe["teacher"]["ema"]))

        def guide(ids: Tensor) -> Tensor:
            return loaded(ids).logits
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    rows = PreparedLoader(prepared, seed=0, global_batch_size=train["global_batch_size"],
                    micro_batch_size=1, dp_rank=0, dp_size=1, workers=0)
    lines = []
    for step in range(train["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = (train["learning_rate"] * reference_factor(train, step)
                           * group.get("ratio", 1.0))
        kd = ce = tokens = 0
        for ids, labels in itertools.chain.from_iterable(map(split_documents, rows.window(step))):
            keep = labels != -100
            log_q = model(ids).logits[0, keep, :vocabulary].double().log_softmax(-1)
            own = (of_document or skewed_losses)(log_q, ids, keep, labels[keep], guide, loss["lam"])
            kd, ce, tokens = kd + own[0], ce + own[1], tokens + int(keep.sum())
        total = (kd + loss["ce_weight"] * ce) / tokens
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for mean, decay in means:
            for held, now in zip(mean.parameters(), model.parameters(), strict=True):
                held.data = decay * held.data + (1 - decay) * now.data
        lines.append({"loss": total.item(), "kd_loss": (kd / tokens).item(),
                      "ce_loss": (ce / tokens).item(), "grad_norm": norm.item(),
                      "learning_rate": optimizer.param_groups[0]["lr"]})
    return lines, {name: parameter.detach() for name, parameter in kept.named_parameters()}
