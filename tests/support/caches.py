"""A teacher's distributions written down by plain transformers, one document at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.data import PreparedDataset, TargetManifest, tokenizer_fingerprint
from amid_ds.data.target_shard import SelectedRow, encode_targets
from amid_ds.data.target_work import TargetWork
from amid_ds.data.targets import TARGET_FORMAT
from amid_ds.run.provenance import model_hash, prepared_hash
from support.data import split_documents


def log_probabilities(model: torch.nn.Module, batch, vocabulary: int) -> Tensor:
    """[n, V] float64 of the batch's labelled positions, in their order."""
    parts = []
    for ids, labels in split_documents(batch):
        with torch.no_grad():
            logits = model(ids).logits[0, labels != -100, :vocabulary]
        parts.append(logits.double().log_softmax(-1))
    return torch.cat(parts)


def write_cache(out: Path, teacher: Path, prepared: Path, *, k: int | None = None,
                draws: int | None = None, seed: int = 0, shard_rows: int = 16) -> Path:
    """Write what the teacher says over the prepared rows into `out`; return the folder.

    k: the most probable ids, None: as many draws by probability as `draws`.
    """
    model = AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer, data = AutoTokenizer.from_pretrained(teacher), PreparedDataset(prepared)
    vocabulary = len(tokenizer)
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(len(data)):
        batch = data.batch([number])
        log_p = log_probabilities(model, batch, vocabulary)
        of_label = log_p.gather(1, batch.targets[:, None])[:, 0]
        rows.append(_most_probable(log_p, of_label, k) if k
                    else _drawn(log_p, of_label, draws, draw))
    manifest = TargetManifest(
        TARGET_FORMAT, "topk" if k else "sample", k, draws, None if k else 1.0,
        None if k else seed, vocabulary, len(data), sum(len(row.ids) for row in rows), shard_rows,
        1, prepared_hash(prepared), tokenizer_fingerprint(tokenizer), model_hash(str(teacher)),
        str(teacher), None, "fp32")
    work = TargetWork(out, manifest)
    work.start()
    while (shard := work.claim(wait=False)) is not None:
        work.finish(shard, [encode_targets(rows[number], manifest.layout)
                            for number in manifest.shard_range(shard)])
    work.publish()
    return out


def _most_probable(log_p: Tensor, of_label: Tensor, k: int) -> SelectedRow:
    ordered, ids = log_p.sort(1, descending=True)
    rest = ordered[:, k:].logsumexp(1) if k < log_p.shape[1] else torch.full_like(of_label,
                                                                                 -torch.inf)
    return SelectedRow(ids[:, :k].numpy(), ordered[:, :k].float().numpy(),
                       of_label.float().numpy(), log_rest=rest.float().numpy())


def _drawn(log_p: Tensor, of_label: Tensor, draws: int, draw: torch.Generator) -> SelectedRow:
    drawn = torch.multinomial(log_p.exp(), draws, replacement=True, generator=draw)
    ids = torch.full((len(log_p), draws), -1)
    counts = torch.zeros_like(ids)
    for row, own in enumerate(drawn):
        once, often = own.unique(return_counts=True)
        ids[row, :len(once)], counts[row, :len(once)] = once, often
    kept = torch.where(ids >= 0, log_p.gather(1, ids.clamp(min=0)), -torch.inf)
    return SelectedRow(ids.numpy(), kept.float().numpy(), of_label.float().numpy(),
                       counts=counts.numpy(),
                       log_proposal_sum=torch.zeros(len(log_p)).numpy())
