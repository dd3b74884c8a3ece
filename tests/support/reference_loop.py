"""The training that a recipe describes, written in plain transformers and torch."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.data import PreparedLoader
from support.data import split_documents


def reference_loop(student: Path, teacher: Path, recipe: dict,
                   prepared: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """Each step's metrics and the trained fp32 weights: the truth for any layout.

    One process, full logits in float64, one document at a time; the skewed KL, the cosine schedule
    and AdamW written out.
    """
    model, guide = (AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    train, loss = recipe["train"], recipe["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=train["learning_rate"], weight_decay=0.01)
    rows = PreparedLoader(prepared, seed=0, global_batch_size=train["global_batch_size"],
                    micro_batch_size=1, dp_rank=0, dp_size=1, workers=0)
    lines = []
    for step in range(train["steps"]):
        warm = train["warmup_steps"]
        angle = torch.tensor(torch.pi * (step - warm) / (train["steps"] - warm))
        factor = (step + 1) / warm if step < warm else 0.5 * (1 + torch.cos(angle).item())
        for group in optimizer.param_groups:
            group["lr"] = train["learning_rate"] * factor
        kd = ce = tokens = 0
        for ids, labels in itertools.chain.from_iterable(map(split_documents, rows.window(step))):
            keep = labels != -100
            log_q = model(ids).logits[0, keep, :vocabulary].double().log_softmax(-1)
            with torch.no_grad():
                log_p = guide(ids).logits[0, keep, :vocabulary].double().log_softmax(-1)
            log_r = torch.log(loss["lam"] * log_p.exp() + (1 - loss["lam"]) * log_q.exp())
            kd = kd + (log_p.exp() * (log_p - log_r)).sum()
            ce = ce + F.nll_loss(log_q, labels[keep], reduction="sum")
            tokens += int(keep.sum())
        total = (kd + loss["ce_weight"] * ce) / tokens
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append({"loss": total.item(), "kd_loss": (kd / tokens).item(),
                      "ce_loss": (ce / tokens).item(), "grad_norm": norm.item(),
                      "learning_rate": optimizer.param_groups[0]["lr"]})
    return lines, {name: parameter.detach() for name, parameter in model.named_parameters()}
