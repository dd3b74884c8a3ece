"""What is learnt by source, and means over sequences: runs against a float64 loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data import split_documents, write_instructions, write_texts
from support.ranks import run_ranks
from support.reference_loop import reference_adamw
from support.runs import read_metrics, write_recipe
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.data import PreparedLoader
from amid_ds.data.batch import Batch, TokenRow, collate_rows

STEPS = 3
TRAIN = {"steps": STEPS, "seq_length": 24, "micro_batch_size": 2, "global_batch_size": 12,
         "learning_rate": 3e-3, "schedule": "constant"}
# (log p, log q, their mixture's log r) of a token to its divergence.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pr": lambda p, q, r: (p.exp() * (p - r)).sum(-1),
    "qr": lambda p, q, r: (q.exp() * (q - r)).sum(-1)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[dict]:
    """Text, whose rows are sequences, and instructions, several of which share a row."""
    folder = tmp_path_factory.mktemp("sources")
    return [{"path": str(write_texts(folder / "text.jsonl")), "text": "text", "weight": 1.0},
            {"path": str(write_instructions(folder / "asked.jsonl")), "prompt": "prompt",
             "response": "response", "weight": 2.0}]


def row(length: int, spans: Sequence[int], starts: Sequence[int] = ()) -> TokenRow:
    return TokenRow(np.arange(length), np.array(spans, np.int32), np.array(starts, np.int32), "")


def test_a_sequence_is_a_document_that_is_kept_apart_or_else_a_row():
    # Two documents and one without a label between them; nothing; one that is cut.
    rows = [row(12, (2, 4, 9, 12), (5, 8)), row(3, ()), row(6, (1, 6))]
    batch = collate_rows(rows, [], [1, 0, 2])
    assert batch.sequences.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2] and batch.sequence_count == 3
    assert batch.source_numbers.tolist() == [1] * 5 + [2] * 5
    weights = batch.sequence_weights(6.0)
    expected = [1 / 12] * 2 + [1 / 18] * 3 + [1 / 30] * 5
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-7, atol=0)
    # Where documents are not known, positions tell them; without positions a row is one.
    told = Batch(batch.input_ids, batch.labels, batch.positions, 0, [], [])
    assert torch.equal(told.sequences, batch.sequences)
    alone = Batch(batch.input_ids, batch.labels, None, 0, [], [])
    assert alone.sequences.tolist() == [0] * 5 + [1] * 5
    empty = collate_rows([row(3, ())], [])
    assert empty.sequence_count == 0 and empty.sequence_weights(0.0).tolist() == []


def reference_metrics(student: Path, teacher: Path, prepared: Path, sources: list[dict],
                      losses: Sequence[dict], normalise: str) -> list[dict]:
    """Each step's metrics with the loss of each source, in float64, a document at a time."""
    model, guide = (AutoModelForCausalLM.from_pretrained(path).double()
                    for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    optimizer = reference_adamw(model, {})
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    rows = PreparedLoader(prepared, seed=0, global_batch_size=12, micro_batch_size=1, dp_rank=0,
                          dp_size=1, workers=0, weights=[source["weight"] for source in sources])
    lines = []
    for step in range(STEPS):
        total = {"loss": [], "kd_loss": [], "ce_loss": []}
        for batch in rows.window(step):
            own, = (loss for loss, source in zip(losses, sources, strict=True)
                    if batch.sources[0].startswith(source["path"]))
            for ids, labels in split_documents(batch):
                keep = labels != -100
                if not keep.any():
                    continue
                log_q = model(ids).logits[0, keep, :vocabulary].log_softmax(-1)
                with torch.no_grad():
                    log_p = guide(ids).logits[0, keep, :vocabulary].log_softmax(-1)
                log_r = torch.log(own["lam"] * log_p.exp() + (1 - own["lam"]) * log_q.exp())
                kd = DIVERGENCES[own["order"]](log_p, log_q, log_r)
                ce = F.nll_loss(log_q, labels[keep], reduction="none")
                loss = own.get("kd_weight", 1.0) * kd + own["ce_weight"] * ce
                for name, values in (("loss", loss), ("kd_loss", kd), ("ce_loss", ce)):
                    total[name].append(values.mean()[None] if normalise == "sequence" else values)
        means = {name: torch.cat(values).mean() for name, values in total.items()}
        optimizer.zero_grad()
        means["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append({**{name: mean.item() for name, mean in means.items()},
                      "grad_norm": norm.item()})
    return lines


def require_same(run: Path, truth: list[dict]) -> None:
    for line, expected in zip(read_metrics(run), truth, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), (run, line["step"], name)


def test_a_mean_over_sequences_is_the_same_on_1_2_and_3_ranks_and_in_a_plain_loop(
        shared_model, sources, tmp_path):
    pair = shared_model("llama-tied", 0), shared_model("gpt2", 1)
    loss = {"lam": 0.3, "order": "pr", "ce_weight": 0.5}
    recipe = write_recipe(
        tmp_path / "r.yaml", *pair, Path(sources[0]["path"]), tmp_path / "run1",
        data__train=sources, data__prepared=str(tmp_path / "data"), train=TRAIN,
        loss={**loss, "normalise": "sequence"})
    truth = None
    # 3 micro-batches of 2 rows, 2 of 3, 3 of 2.
    for ranks, rows in ((1, 4), (2, 2), (3, 2)):
        run = tmp_path / f"run{ranks}"
        run_ranks(ranks, "train", recipe, f"output_dir={run}", f"train.micro_batch_size={rows}")
        truth = truth or reference_metrics(*pair, tmp_path / "data", sources, [loss, loss],
                                           "sequence")
        require_same(run, truth)
