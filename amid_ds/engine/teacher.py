"""A recipe's teacher by itself, whole or sharded or tensor parallel: its hidden states and head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from amid_ds.config.recipe import Recipe, Teacher
from amid_ds.data import Batch
from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.distributed.world import World
from amid_ds.engine.body_split import BodySplit, check_split, make_tensor_parallel_groups
from amid_ds.engine.build import build_teacher_engine, choose_attention_of
from amid_ds.engine.ds_config import DeepSpeedConfig
from amid_ds.engine.engine import Engine
from amid_ds.engine.gather import gathered_head
from amid_ds.losses import LMHead
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import check_head, check_isolation, ids_to_check, sharded_head_of
from amid_ds.models.loading import load_causal_lm
from amid_ds.models.tensor_parallel import cut_head, vocab_shard


def _held(_: nn.Module) -> AbstractContextManager[None]:
    """The context of a head that this rank holds anyway."""
    return nullcontext()


class OpenTeacher:
    """A teacher that is ready to run.

    model: the causal LM; gathered: a context in which its head can be read; before_pass: called
    before each forward pass.
    """

    def __init__(self, model: nn.Module, vocab_size: int, shard: VocabShard | None,
                 gathered: Callable[[nn.Module], AbstractContextManager[None]] = _held,
                 before_pass: Callable[[], None] = lambda: None) -> None:
        self.vocab_size = vocab_size
        self._model, self._shard, self.gathered = model, shard, gathered
        self._before_pass = before_pass
        # Its hidden states at labelled places are what a student's are.
        self._distiller = Distiller(model, None, vocab_size=vocab_size, shard=shard)
        self._distiller.eval()

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """[n, H] at the n labelled positions of a batch on the device. Collective where sharded."""
        self._before_pass()
        return self._distiller.hidden_states(batch)[0]

    @contextlib.contextmanager
    def head(self) -> Iterator[tuple[LMHead, VocabShard | None]]:
        """A context with the head, this rank's rows of it. Collective where sharded."""
        with self.gathered(self._model), torch.no_grad():
            yield sharded_head_of(self._model, self._shard), self._shard


@contextlib.contextmanager
def open_teacher(recipe: Recipe, config: DeepSpeedConfig, vocab_size: int, is_whole: bool,
                 world: World) -> Iterator[OpenTeacher]:
    """The recipe's teacher on the ranks of `world`. Collective.

    is_whole: every rank holds all of it. Otherwise ZeRO-3 shards what tensor parallelism leaves
    over `world.shards`; it is gathered once if it fits. Raises InputError where its logits are not
    those of its own forward, or it does not keep documents apart that are to be.
    """
    teacher = recipe.live_teacher
    assert teacher is not None
    with contextlib.ExitStack() as stack:
        first_forwards: AbstractContextManager[None] = contextlib.nullcontext()
        if is_whole:
            model = world.run_checked(lambda: load_causal_lm(
                teacher.model, teacher.dtype, **teacher.hub_kwargs).to(world.device).eval())
            choose_attention_of(model, "the teacher", recipe, world, trains=False)
            opened = OpenTeacher(model, vocab_size, None)
        else:
            shard = vocab_shard(vocab_size, world.tp_rank, world.tp_size, world.tp_group)
            engine = world.run_checked(lambda: _engine(recipe, teacher, config, vocab_size, shard,
                                                       world))
            model = engine.module if shard is None else engine.distiller.student
            if engine.fits_gathered(model):
                stack.enter_context(engine.gathered(model))
                opened = OpenTeacher(model, vocab_size, shard)
            else:
                opened = OpenTeacher(model, vocab_size, shard, engine.gathered_head,
                                     engine.reset_prefetch)
                first_forwards = engine.reads_registered()
        with first_forwards:
            world.run_checked(lambda: _check(recipe, model, opened, world))
        yield opened


def _engine(recipe: Recipe, teacher: Teacher, config: DeepSpeedConfig, vocab_size: int,
            shard: VocabShard | None, world: World) -> Engine:
    """The engine around the teacher, or, under tensor parallelism, around a distiller that has it
    in the student's place."""
    zero = {**config.get("zero_optimization", {}), "stage": 3}
    config = {**config, "zero_optimization": zero}
    if shard is not None:
        config = {**config, "tensor_parallel": {"autotp_size": world.tp_size}}

    def shape(model: nn.Module) -> nn.Module:
        choose_attention_of(model, "the teacher", recipe, world, trains=False)
        if shard is None:
            return model
        make_tensor_parallel_groups(world.tp_size)
        cut_head(model, shard, vocab_size, gathered_head)
        distiller = Distiller(model, None, vocab_size=vocab_size, shard=shard)
        BodySplit(distiller, world)
        return distiller

    return build_teacher_engine(teacher, config, world, shape)


def _check(recipe: Recipe, model: nn.Module, opened: OpenTeacher, world: World) -> None:
    """Raise InputError where the model is not what its body and head give here."""
    assert recipe.live_teacher is not None
    title = f"the teacher {recipe.live_teacher.model}"
    ids = ids_to_check(model, opened.vocab_size).to(world.device)
    check_split(model, title, ids, world)
    check_head(model, title, ids, opened.gathered)
    if recipe.data.isolates_any:
        check_isolation(model, title, ids)
