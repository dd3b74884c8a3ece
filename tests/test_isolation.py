"""Documents that share a row: changing one changes nothing for the others, in any model family."""

from __future__ import annotations

import pytest
import torch
from support.families import tiny_model
from support.models import WORDS
from transformers import AutoModelForCausalLM

from amid_ds.data import Batch
from amid_ds.errors import InputError
from amid_ds.losses import AMiD
from amid_ds.models.distiller import Distiller, LossPart, StepObjective
from amid_ds.models.heads import check_isolation, ids_to_check

FAMILIES = ("llama", "llama-tied", "qwen3", "gemma2", "qwen2-tied", "gpt2")
# Tokens of each document in the row; Gemma's window of 8 ends inside one of them.
LENGTHS = (5, 13, 1, 9)
PARTS = [LossPart(StepObjective(AMiD(lam=0.3), kd_weight=1.0, ce_weight=0.5))]


@pytest.fixture(scope="module")
def models(shared_model):
    return {family: AutoModelForCausalLM.from_pretrained(shared_model(family, seed))
            for seed, family in enumerate(FAMILIES)}


def losses_of(distiller: Distiller, ids: torch.Tensor, positions: torch.Tensor) -> list[float]:
    """The loss of each document of the row. The teacher gets a longer row in the same pass."""
    labels = ids.roll(-1, 1)
    longer = torch.ones(1, ids.shape[1] + 3, dtype=torch.int64)
    batch = Batch(ids, labels, positions, 0, [], [])
    teacher_hidden, _ = distiller.teacher_hidden_states(
        [batch, Batch(longer, longer, None, 0, [], [])], 2)
    document = (positions == 0).cumsum(1).flatten() - 1
    return [distiller(ids, batch.valid, batch.targets, (document == i).float(), teacher_hidden,
                      positions, parts=PARTS).loss.item()
            for i in range(len(LENGTHS))]


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_document_leaves_the_others_losses_as_they_were_to_the_last_digit(models,
                                                                                     family):
    teacher = models[FAMILIES[FAMILIES.index(family) - 1]]
    distiller = Distiller(models[family].eval(), teacher, vocab_size=len(WORDS) + 3)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(WORDS), (1, sum(LENGTHS)), generator=draw)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    before = losses_of(distiller, ids, positions)
    start = 0
    for changed, length in enumerate(LENGTHS):
        other = ids.clone()
        # Not its first token: that is a label of the document before.
        other[:, start + 1:start + length] += 1
        after = losses_of(distiller, other, positions)
        different = [i for i, (old, new) in enumerate(zip(before, after, strict=True))
                     if old != new]
        assert different == ([changed] if length > 1 else [])
        document, labels = (tokens[:, start:start + length] for tokens in (ids, ids.roll(-1, 1)))
        batch = Batch(document, labels, None, 0, [], [])
        teacher_hidden, = distiller.teacher_hidden_states([batch], 1)
        alone = distiller(document, batch.valid, batch.targets, torch.ones(length), teacher_hidden,
                          parts=PARTS).loss
        assert alone.item() == pytest.approx(before[changed], rel=1e-4)
        start += length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_lets_documents_see_one_another_is_refused(models, family):
    model = models[family]
    ids = torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(1))
    check_isolation(model, "the student", ids)
    forward = model.base_model.forward
    try:
        for leaking in (lambda input_ids, use_cache, position_ids=None: forward(input_ids),
                        lambda input_ids, use_cache: forward(input_ids)):
            model.base_model.forward = leaking
            with pytest.raises(InputError, match=r"apart: in its layer 0 .* change with the "
                                                 "documents before it"):
                check_isolation(model, "the student", ids)
    finally:
        model.base_model.forward = forward


def test_a_model_whose_documents_begin_at_another_position_than_0_is_refused(models, monkeypatch):
    """They see nothing of one another, and yet are not what each by itself would be."""
    model = models["gpt2"]
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward",
                        lambda positions: embed(torch.arange(positions.shape[-1])[None]))
    with pytest.raises(InputError, match=r"apart: in its layer 0 .* are not those that it has in a "
                                         "row alone"):
        check_isolation(model, "the student", ids_to_check(model, 30))


def test_the_rounding_of_many_layers_refuses_no_model():
    """Of 48 random ones in bf16 it is 0.04 of the states: twice what one layer is allowed."""
    model = tiny_model("llama", num_hidden_layers=48).bfloat16()
    check_isolation(model, "the student", ids_to_check(model, 300))
