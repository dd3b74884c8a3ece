"""`amid-ds cache`: a teacher's distributions written down, the same bytes by any ranks and jobs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.runs import write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.cli import main
from amid_ds.data import PreparedDataset, TargetFolder


@pytest.fixture(scope="module")
def models(llama_pair):
    return llama_pair


def make_recipe(folder: Path, models, rows: Path, **changes) -> Path:
    student, teacher = models
    changes.setdefault("train__micro_batch_size", 4)
    return write_recipe(folder / "recipe.yaml", student, teacher, rows, folder / "run",
                        data__prepared=str(folder / "prepared"), **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def true_log_p(teacher: Path, prepared: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """By row: log p [n, V] in float64 by transformers alone, and the next tokens [n]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    rows = PreparedDataset(prepared)
    found = []
    for number in range(len(rows)):
        row = rows.row(number)
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        logits = model(input_ids=tokens[None, :-1]).logits[0]
        places = np.concatenate([np.arange(start, stop) for start, stop in zip(
            row.loss_spans[::2], row.loss_spans[1::2], strict=True)])
        found.append((logits.log_softmax(-1).numpy()[places - 1], row.tokens[places]))
    return found


@pytest.mark.parametrize("rows", ["text", "instructions"])
@pytest.mark.parametrize("options", [["--topk", "8"], ["--sample", "12", "--exponent", "0.8"]],
                         ids=["topk", "sample"])
def test_what_is_kept_is_the_teachers_own_log_softmax_within_the_stated_error(
        options, rows, models, request, tmp_path):
    recipe = make_recipe(tmp_path, models, request.getfixturevalue(f"{rows}_file"))
    out = tmp_path / "cache"
    assert main(["cache", str(recipe), "--out", str(out), *options]) == 0
    folder = TargetFolder.open(out)
    truth = true_log_p(models[1], tmp_path / "prepared")
    assert len(folder) == len(truth)
    assert folder.manifest.positions == sum(len(labels) for _, labels in truth)
    for number, (log_p, labels) in enumerate(truth):
        row = folder.row(number)
        assert len(row.ids) == len(labels)
        kept = row.ids >= 0
        own = np.take_along_axis(log_p, row.ids.clip(0), -1)
        # fp16's half of the last digit, and fp32 arithmetic of the model.
        error = 2**-11 * np.abs(own) + 1e-4
        assert (np.abs(row.log_probabilities - own)[kept] <= error[kept]).all()
        label = np.take_along_axis(log_p, labels[:, None].astype(np.int64), -1)[:, 0]
        assert (np.abs(row.label_log_probabilities - label) <= 2**-11 * np.abs(label) + 1e-4).all()
        if options[0] == "--topk":
            least_kept = own.min(-1, keepdims=True)
            assert ((log_p > least_kept + 1e-4).sum(-1) <= 8).all()
            rest = np.log1p(-np.exp(own).sum(-1))
            assert (np.abs(row.log_rest - rest) <= 2**-11 * np.abs(rest) + 1e-3).all()
