"""Evaluation sets during training: the student's loss and its distance to its teacher.

They are evaluated by name in the engine that trains. The models stay sharded, and the metrics come
from the fused head in blocks, so an evaluation needs no more memory than a step does. A set is cut
into the same batches on any number of ranks, every rank has as many of them as the others (some may
be empty), and sums over tokens are divided once. The price is that a rank may wait for one batch.
eval/evaluate.py, for a model by itself, is written independently of this; tests compare the two.
"""

from __future__ import annotations

import itertools
import logging
import math

import torch

from amid_ds.config.recipe import Recipe
from amid_ds.data import Batch, read_batches
from amid_ds.data.batch import require_ids_below
from amid_ds.data.grown import GrownVocabulary
from amid_ds.engine.engine import Engine
from amid_ds.errors import TrainingError
from amid_ds.run.log import finite, perplexity

logger = logging.getLogger(__name__)

EvalMetrics = dict[str, float | None]
# Batches that are read before the ranks agree that they could be.
BATCHES_READ = 32


def validate(recipe: Recipe, engine: Engine,
             grown: GrownVocabulary | None = None) -> dict[str, EvalMetrics]:
    """Metrics of every set in `data.eval`, by name.

    grown: what new tokens are to the teacher: to `kl_to_teacher` and `top1_agreement` each is then
    its first piece.

    tokens; loss: mean negative log-likelihood in nats; perplexity, None beyond a float;
    kl_to_teacher: mean KL(teacher ‖ student) in nats; top1_agreement: the share of tokens where
    both have the same first choice. The last two are None without a teacher. A loss or divergence
    that is infinite is None, with a warning: a student that never says some token may be trained
    soundly. Raises TrainingError for NaN. Collective: every rank calls it after the same step.
    """
    with engine.evaluating():
        return {each.name: _metrics(each.name, _sums(recipe, engine, each.name, grown),
                                    engine.distiller.teacher is not None)
                for each in recipe.data.eval}


def _sums(recipe: Recipe, engine: Engine, name: str,
          grown: GrownVocabulary | None) -> list[float]:
    """`Distiller.score` of the whole set, over all ranks."""
    distiller, world = engine.distiller, engine.world
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    batches = read_batches(recipe.prepared_dir / "eval" / name, recipe.train.micro_batch_size,
                           world.dp_rank, world.dp_size)

    def read_some() -> list[Batch]:
        read = list(itertools.islice(batches, BATCHES_READ))
        require_ids_below(distiller.head.vocab_size, read)
        return read if grown is None else grown.with_teachers_rows(read)

    # Agreed on, because every batch has collectives: a row that is damaged on one rank is an error
    # of all.
    while read := world.run_checked(read_some):
        for batch in read:
            batch = batch.to(world.device)
            hidden = distiller.hidden_states(batch)
            with engine.gathered_head(distiller.student), engine.gathered_head(distiller.teacher):
                sums += distiller.score(*hidden, batch.targets)
    return world.sum(sums)


def _metrics(name: str, sums: list[float], has_teacher: bool) -> EvalMetrics:
    nll, kl, agreed, tokens = sums
    if math.isnan(nll) or math.isnan(kl):
        raise TrainingError(f"on the evaluation set {name!r} the loss is {nll / tokens}, "
                            f"the KL to the teacher {kl / tokens}")
    for value, what in ((nll, "loss"), (kl, "KL to the teacher")):
        if math.isinf(value):
            logger.warning(f"on the evaluation set {name!r} the {what} is infinite: the student's "
                           "logit is -inf for a token of the data, or for one that the teacher "
                           "gives some probability")
    loss = finite(nll / tokens)
    return {"tokens": int(tokens), "loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            "kl_to_teacher": finite(kl / tokens) if has_teacher else None,
            "top1_agreement": agreed / tokens if has_teacher else None}
