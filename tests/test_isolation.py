"""Documents that share a row: what one of them holds changes nothing for the others, in any family of models."""

from __future__ import annotations

import pytest
import small
import torch
from transformers import AutoModelForCausalLM

from amid_ds.data import Batch
from amid_ds.errors import InputError
from amid_ds.losses import AMiD
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import check_isolation

FAMILIES = ("llama", "llama-tied", "qwen3", "gemma2", "qwen2-tied", "gpt2")
LENGTHS = (5, 13, 1, 9)      # of the documents in the row; Gemma's window of 8 ends inside one of them


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: AutoModelForCausalLM.from_pretrained(small.make_model(folder / family, family, seed))
            for seed, family in enumerate(FAMILIES)}


def losses_of(distiller: Distiller, ids: torch.Tensor, positions: torch.Tensor) -> list[float]:
    """The loss of each document of the row, alone in the sum. The teacher sees a longer row in the same pass."""
    labels = ids.roll(-1, 1)
    longer = torch.ones(1, ids.shape[1] + 3, dtype=torch.int64)
    lesson, _ = distiller.teach([Batch(ids, labels, positions, 0, [], []), Batch(longer, longer, None, 0, [], [])], 2)
    document = (positions == 0).cumsum(1) - 1
    return [distiller(ids, labels, (document == i).float(), lesson, positions)[0].item() for i in range(len(LENGTHS))]


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_document_leaves_the_others_losses_as_they_were_to_the_last_digit(models, family):
    teacher = models[FAMILIES[FAMILIES.index(family) - 1]]
    distiller = Distiller(models[family].eval(), teacher, AMiD(lam=0.3), kd_weight=1.0, ce_weight=0.5,
                          vocab_size=len(small.WORDS) + 3)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(small.WORDS), (1, sum(LENGTHS)), generator=draw)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    before = losses_of(distiller, ids, positions)
    start = 0
    for changed, length in enumerate(LENGTHS):
        other = ids.clone()
        other[:, start + 1:start + length] += 1      # not its first token: that is the label of the one before
        after = losses_of(distiller, other, positions)
        assert [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == \
            ([changed] if length > 1 else [])
        document, labels = (tokens[:, start:start + length] for tokens in (ids, ids.roll(-1, 1)))
        lesson, = distiller.teach([Batch(document, labels, None, 0, [], [])], 1)
        apart = distiller(document, labels, torch.ones(1, length), lesson)[0].item()
        assert apart == pytest.approx(before[changed], rel=1e-4)
        start += length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_lets_documents_see_one_another_is_refused(models, family):
    model, ids = models[family], torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(1))
    check_isolation(model, "the student", ids)
    forward = model.base_model.forward
    try:
        model.base_model.forward = lambda input_ids, use_cache, position_ids: forward(input_ids=input_ids)
        with pytest.raises(InputError, match="does not keep the documents of one row apart: a document"):
            check_isolation(model, "the student", ids)
        model.base_model.forward = lambda input_ids, use_cache: None
        with pytest.raises(InputError, match="it takes no positions"):
            check_isolation(model, "the student", ids)
    finally:
        model.base_model.forward = forward
