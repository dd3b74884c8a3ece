"""A run before its first step: checked recipe, identity, folder; and the model that it leaves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amid_ds.checkpoint import export
from amid_ds.checkpoint.manifest import checkpoint_name, checkpoint_step, list_checkpoints
from amid_ds.checkpoint.state import Layout
from amid_ds.checkpoint.whole_student import FROZEN_HASH
from amid_ds.config.parse import dump_recipe
from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.data import (
    check_sources,
    end_of_text_id,
    load_tokenizer,
    prepare_all,
    require_same_tokenizer,
    vocabulary_size,
    with_steps,
)
from amid_ds.data.grown import GrownVocabulary, grown_vocabulary
from amid_ds.distributed.nodes import require_divisor
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.ds_config import DeepSpeedConfig
from amid_ds.engine.expert_parallel import require_expert_parallel
from amid_ds.engine.optimizer import decayed_parameters, group_counts
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval.tasks import check_tasks
from amid_ds.eval.text_metrics import require_rouge
from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import Fence
from amid_ds.models.fit import require_positions, require_rows, table_of_positions
from amid_ds.models.loading import meta_model, require_supported, supported_model
from amid_ds.models.tensor_parallel import split_kinds
from amid_ds.models.tp_plan import blocks_of
from amid_ds.models.trained import choose_trained, trains_in_part
from amid_ds.run.attempts import has_saved
from amid_ds.run.exclusive import exclusive
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics
from amid_ds.run.places import check_places, require_own_model
from amid_ds.run.provenance import SourceHashes, hash_sources, prepared_hash, provenance
from amid_ds.run.warm_start import frozen_models, resolve_student
from amid_ds.training.cached_teacher import check_cached_teacher
from amid_ds.training.compatibility import (
    changes_since_last_attempt,
    flat_recipe,
    pin,
    refuse_other_identity,
    refuse_other_run,
)
from amid_ds.training.objective import check_objectives, require_all_foldable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from amid_ds.planning.placement import ChosenPlacement

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that is known before a weight is read.

    placement: the teacher's on these ranks, see training/placement.py; None before it is decided.
    grown: what the student's new tokens are to its teacher; None: they have one vocabulary.
    """

    recipe: Recipe
    deepspeed_config: DeepSpeedConfig
    tokenizer: PreTrainedTokenizerBase
    placement: ChosenPlacement | None = None
    grown: GrownVocabulary | None = None

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.recipe.output_dir))

    @property
    def placed_recipe(self) -> Recipe:
        """The recipe with the teacher's placement in place of `auto`: for the engine."""
        teacher, chosen = self.recipe.live_teacher, self.placement
        if teacher is None or chosen is None:
            return self.recipe
        placed = {"placement": chosen.placement, "shard_over": chosen.shard_over}
        return self.recipe.model_copy(update={"teacher": teacher.model_copy(update=placed)})

    @property
    def student_dtype(self) -> str:
        """The dtype that the student trains in; the optimizer's weights are in fp32 always."""
        return "bf16" if ds_config.uses_bf16(self.deepspeed_config) else "fp32"

    @property
    def vocab_size(self) -> int:
        """The number of the student's ids, which the teacher shares unless they have `grown`; a
        wider model's further columns are padding."""
        return vocabulary_size(self.tokenizer)

    def layout(self, world: World) -> Layout:
        """The layout that the engine will have on these ranks."""
        return Layout.of(world, ds_config.zero_stage(self.deepspeed_config), self.student_dtype,
                         decayed_parameters(self.recipe), self._split(world.tp_size))

    def _split(self, tp_size: int) -> tuple[str, ...]:
        """What tensor parallelism splits of the student's body, see `split_kinds`."""
        if tp_size == 1:
            return ()
        origin = resolve_student(self.recipe)
        student = meta_model(origin.model, **origin.hub_kwargs)
        choose_trained(student, self.recipe.student)
        return split_kinds(blocks_of(student, tp_size))


def check_recipe(recipe: Recipe, ranks: int, headers: bool = True) -> Job:
    """The job, after every check that needs neither a model's weights nor prepared data.

    headers: read those of the models' weight files too, and the names of benchmarks; of many ranks
    one does it for all.
    Its recipe names the commits of models on the hub. Where it has epochs, `count_steps` makes the
    checks that need the number of steps. Raises InputError.
    """
    recipe = pin(recipe)
    data_parallel = ds_config.data_parallel_size(recipe, ranks)
    config = ds_config.read_deepspeed_config(recipe, data_parallel)
    if recipe.live_teacher is not None and recipe.live_teacher.shard_over is not None:
        require_divisor(recipe.live_teacher.shard_over, data_parallel)
    check_places(recipe)
    if any(each.generate for each in recipe.data.eval):
        require_rouge()
    if recipe.eval_tasks is not None and headers:
        check_tasks(recipe.eval_tasks.tasks)
    check_objectives(recipe)
    refuse_other_run(recipe)
    check_sources(recipe.data)
    student, frozen = resolve_student(recipe), frozen_models(recipe)
    models: dict[str, Student | Teacher] = {
        f"student {student.model}": student,
        **{f"{key} {model.model}": model for key, model in frozen.items()}}
    look = require_supported if headers else supported_model
    metas = {name: look(model.model, **model.hub_kwargs) for name, model in models.items()}
    tokenizer = load_tokenizer(student.model, **student.hub_kwargs)
    grown, teacher = None, recipe.live_teacher
    if teacher is not None and teacher.vocabulary == "grown":
        grown = grown_vocabulary(
            tokenizer, load_tokenizer(teacher.model, **teacher.hub_kwargs), student.model,
            teacher.model, table_of_positions(metas[f"teacher {teacher.model}"]))
        require_all_foldable(recipe)
    for model in () if grown is not None else frozen.values():
        require_same_tokenizer(tokenizer, load_tokenizer(model.model, **model.hub_kwargs),
                               student.model, model.model)
    check_cached_teacher(recipe, tokenizer, headers)
    for name, meta in metas.items():
        known = grown.old if grown is not None and name.startswith("teacher ") else None
        require_rows(meta, f"the {name}", known or vocabulary_size(tokenizer))
        require_positions(meta, f"the {name}", recipe.train.seq_length)
    choose_trained(metas[f"student {student.model}"], recipe.student)
    require_expert_parallel(recipe, config, data_parallel, metas)
    if recipe.rollout is not None:
        end_of_text_id(tokenizer, recipe.rollout.end_of_text)
    return Job(recipe, config, tokenizer, grown=grown)


def count_steps(job: Job, world: World) -> Job:
    """The job with steps for the recipe's epochs; its data are prepared then. Collective.

    The run's lease is held. From here on the recipe says `steps`, as if the user had: so does the
    run's recipe.yaml, which therefore reproduces the run, and a resumed run is the same one if it
    comes to the same number. Raises InputError.
    """
    epochs = job.recipe.train.epochs
    if epochs is None:
        return job

    def count() -> Recipe:
        prepare_all(job.recipe.data, job.recipe.train.seq_length, job.tokenizer,
                    job.recipe.prepared_dir)
        counted = with_steps(job.recipe)
        check_objectives(counted)
        refuse_other_run(counted)
        return counted

    recipe = world.run_on_main(count)
    logger.info("%d epoch(s) are %d steps of %d rows", epochs, recipe.train.total_steps,
                recipe.train.global_batch_size)
    return replace(job, recipe=recipe)


def identity_of(job: Job, sources: SourceHashes, checkpoint: Path | None) -> dict[str, object]:
    """The run's identity as flat keys: the resolved recipe, and hashes of what it names.

    Raises InputError where `checkpoint`, to be resumed from, learnt from something else.
    """
    recipe = job.recipe
    hashes: dict[str, object] = {
        "tokenizer.sha256": sources.tokenizer,
        "data.sha256": None if recipe.data.streams else prepared_hash(recipe.prepared_dir)}
    if recipe.data.auxiliary is not None:
        hashes["auxiliary.sha256"] = prepared_hash(recipe.prepared_dir / "auxiliary")
    hashes |= {f"{key}.sha256": sha256 for key, sha256 in sources.frozen.items()}
    if sources.cache is not None:
        hashes["teacher.cache_sha256"] = sources.cache
    if job.grown is not None:
        hashes["teacher.pieces_sha256"] = job.grown.sha256
    if trains_in_part(recipe.student):
        # What is frozen is in no checkpoint: every attempt reads it anew.
        hashes[FROZEN_HASH] = sources.student
    identity = {**flat_recipe(recipe), **hashes, "student.dtype": job.student_dtype}
    if checkpoint is not None:
        refuse_other_identity(checkpoint, identity, recipe.checkpoint.allow_change)
    return identity


@contextlib.contextmanager
def hold_run(job: Job, world: World) -> Iterator[Fence]:
    """Make the run's folder and hold its lease. Collective, at the beginning.

    A run that is refused before it has written anything leaves no folder.
    """
    def make() -> None:
        with _unwritable_is_bad_input(job):
            job.run.path.mkdir(parents=True, exist_ok=True)

    world.run_on_main(make)
    try:
        with exclusive(job.run.lease, f"the run {job.run.path}", world) as fence:
            yield fence
    finally:
        if world.is_main:
            with contextlib.suppress(OSError):
                job.run.path.rmdir()


def open_run(job: Job, world: World) -> SourceHashes:
    """Write the resolved recipe and the provenance of everything that the run uses. Collective."""
    def write() -> SourceHashes:
        hashes, student = hash_sources(job.recipe, job.tokenizer), _meta_student(job.recipe)
        with _unwritable_is_bad_input(job):
            # First: it is the sign that the folder is ours.
            replace_text(job.run.provenance, provenance(job.recipe, hashes, world.size,
                                                        _optimizer_facts(job.recipe, student),
                                                        _placement_facts(job),
                                                        _trained_facts(job.recipe, student)))
            replace_text(job.run.recipe, dump_recipe(job.recipe))
            export.keep_student(job.recipe)
        return hashes

    return world.run_on_main(write)


def _placement_facts(job: Job) -> dict[str, object]:
    """The placement of the teacher and the reason; {} without one."""
    return {} if job.placement is None else {"placement": asdict(job.placement)}


def _optimizer_facts(recipe: Recipe, student: nn.Module) -> dict[str, object]:
    """The optimizer's name, and the student's parameters in each of its groups; frozen ones too,
    where there are any."""
    return {"name": recipe.train.optimizer, "groups": group_counts(student, recipe.train)}


def _meta_student(recipe: Recipe) -> nn.Module:
    """The student as it trains, on the meta device."""
    origin = resolve_student(recipe)
    model = meta_model(origin.model, **origin.hub_kwargs)
    choose_trained(model, origin)
    return model


def _trained_facts(recipe: Recipe, student: nn.Module) -> dict[str, object]:
    """The numbers of the student's parameters that train and that do not, and its adapters."""
    counts = {True: 0, False: 0}
    for parameter in student.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    lora = recipe.student.lora
    return {"trained": counts[True], "frozen": counts[False],
            "lora": None if lora is None else lora.model_dump()}


@contextlib.contextmanager
def _unwritable_is_bad_input(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the output folder {job.run.path} cannot be written: {error}",
                         "a folder that can be written",
                         "set output_dir to another folder") from None


def begin_from(job: Job) -> None:
    """Put the weights that the run begins with in place, unless its checkpoints are out of sight.

    On rank 0. Raises TrainingError where they are, InputError.
    """
    _require_checkpoints(job)
    export.start_from(job.recipe)


def changes_of(job: Job) -> dict[str, list[object]]:
    """The recipe's changes since the last attempt, by key, if the run may go on with them.

    On rank 0. Raises InputError.
    """
    _refuse_steps_behind(job)
    return changes_since_last_attempt(job.recipe)


def _require_checkpoints(job: Job) -> None:
    """Raise TrainingError if checkpoints of the run are out of sight: it must not start over.

    A run that has logged steps and saved none may: its folder of checkpoints is there, since that
    is made before the first step.
    """
    steps = max((line["step"] for line in read_metrics(job.run.path)), default=0)
    if not steps:
        return
    try:
        # Of a folder without permission `glob` says that it is empty.
        if any(job.run.checkpoints.iterdir()) and list_checkpoints(job.run.checkpoints):
            return
        problem = "holds no checkpoint" if has_saved(job.run.path) else None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem is not None:
        raise TrainingError(
            f"the run {job.run.path} had {steps} steps, and {job.run.checkpoints} {problem}: is a "
            "file system not mounted?\n  the run does not start over by itself: bring the "
            "checkpoints back, or move the folder away to begin again")


def _refuse_steps_behind(job: Job) -> None:
    """Raise InputError where the run has gone on beyond what is the recipe's last step now."""
    saved, steps = list_checkpoints(job.run.checkpoints), job.recipe.train.total_steps
    if saved and checkpoint_step(saved[-1]) > steps:
        raise InputError(f"train.steps {steps}, and the run {job.run.path} has the checkpoint "
                         f"{saved[-1].name}", "a last step that is still ahead of the run",
                         "raise train.steps; or move the checkpoints away from which it is not to "
                         "go on, in a copy of the run's folder")


def export_final_model(job: Job, step: int, world: World, fence: Fence) -> None:
    """Export the finished run's student, that of `step`, to RUN/model. Collective."""
    last = job.run.checkpoints / checkpoint_name(step)
    export_model(job, last, job.run.model, world, fence)
    logger.info("%s: the model is in %s", job.run.path.name, job.run.model)


def export_model(job: Job, checkpoint: Path, out: Path, world: World, fence: Fence) -> None:
    """Export a checkpoint of the run to a folder of the run. Collective.

    Raises TrainingError where it is not there, InputError where `out` is not the run's own.
    """
    def write() -> None:
        if not checkpoint.is_dir():
            raise TrainingError(f"the last checkpoint {checkpoint} could not be saved\n"
                                "  make room, and start again: the run goes on from the one before")
        require_own_model(out)
        fence.check()
        export.write_export(checkpoint, job.recipe, out)

    world.run_on_main(write)
