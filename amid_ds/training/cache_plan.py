"""What `amid-ds cache` is asked for, checked; its folder's plan and size; `plan --cache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe, Teacher
from amid_ds.data import (
    check_sources,
    load_tokenizer,
    prepare_all,
    require_same_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from amid_ds.data.manifest import read_prepared_manifest
from amid_ds.data.target_shard import ROW_BYTES, TargetLayout
from amid_ds.data.target_work import TargetWork
from amid_ds.data.targets import TARGET_FORMAT, TargetManifest
from amid_ds.distributed.nodes import ranks_of_copy
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.ds_config import DeepSpeedConfig
from amid_ds.errors import InputError
from amid_ds.files.atomic import require_disk_space
from amid_ds.models.fit import require_positions, require_rows
from amid_ds.models.loading import checkpoint_dtype, require_supported, supported_model
from amid_ds.run.folder import RunFolder
from amid_ds.run.places import check_cache_place, check_places
from amid_ds.run.provenance import model_hash, prepared_hash
from amid_ds.run.warm_start import resolve_student
from amid_ds.training.compatibility import pin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_K = 64
MAX_DRAWS = (1 << 16) - 1
# The rows are cut into about so many shards, or more if they would be larger than MAX_SHARD_BYTES.
SHARDS = 64
MAX_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class CacheArgs:
    """The arguments of `amid-ds cache`; see its --help. Bad values raise InputError.

    out: None: beside the prepared data. exponent: None: 1.
    """

    recipe: str
    overrides: Sequence[str] = ()
    out: str | None = None
    topk: int | None = None
    sample: int | None = None
    exponent: float | None = None

    def __post_init__(self) -> None:
        if self.topk is not None and self.sample is not None:
            raise InputError(f"--topk {self.topk} and --sample {self.sample}", "one of them",
                             "top-k for any objective, samples for forward KL and cross entropy")
        for option, number, most in (("--topk", self.topk, None),
                                     ("--sample", self.sample, MAX_DRAWS)):
            if number is not None and not 1 <= number <= (most or number):
                raise InputError(f"{option} {number}", "1 or more" if most is None else
                                 f"1 to {most}", f"give {option} such a number")
        if self.exponent is None:
            return
        if self.sample is None:
            raise InputError(f"--exponent {self.exponent} without --sample",
                             "it, of the probabilities that are drawn with", "leave it out")
        if not 0 < self.exponent < float("inf"):
            raise InputError(f"--exponent {self.exponent}", "a finite number above 0",
                             "1 draws from the teacher's own distribution")

    def layout(self, vocab_size: int) -> TargetLayout:
        """The numbers' sizes in the folder. Raises InputError for more ids than there are."""
        if self.sample is not None:
            return TargetLayout(vocab_size, self.sample, True)
        if self.topk is not None and self.topk > vocab_size:
            raise InputError(f"--topk {self.topk} of a vocabulary of {vocab_size} ids",
                             f"1 to {vocab_size}", f"--topk {vocab_size} keeps all of them")
        return TargetLayout(vocab_size, self.topk or min(DEFAULT_K, vocab_size), False)


@dataclass(frozen=True)
class CacheTask:
    """Validated arguments, and what they resolve to."""

    args: CacheArgs
    recipe: Recipe
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    deepspeed_config: DeepSpeedConfig

    @property
    def vocab_size(self) -> int:
        """The ids that the distributions are over."""
        return vocabulary_size(self.tokenizer)

    @property
    def out(self) -> Path:
        """The folder that is written."""
        if self.args.out is not None:
            return Path(self.args.out)
        prepared, layout = self.recipe.prepared_dir, self.args.layout(self.vocab_size)
        kept = f"sample{layout.entries}" if layout.sampled else f"topk{layout.entries}"
        return prepared.with_name(f"{prepared.name}-{kept}")

    @property
    def is_whole(self) -> bool:
        """True where every rank holds the teacher whole."""
        return self.teacher.placement == "replicated" or (
            self.recipe.tensor_parallel == 1 and ds_config.zero_stage(self.deepspeed_config) < 3)

    @property
    def tensor_parallel(self) -> int:
        """Ranks that share a copy; of a whole teacher each rank has other rows."""
        return 1 if self.is_whole else self.recipe.tensor_parallel

    def shard_over(self, world: World) -> int | None:
        """The neighbouring data-parallel ranks over which the teacher lies; None: all. Collective.

        Nothing is planned: the placement `auto` is `zero3`.
        """
        if self.is_whole or self.teacher.placement != "node":
            return None
        return world.run_on_main(
            lambda: ranks_of_copy(self.teacher.shard_over, self.tensor_parallel, world))


def load_cache_recipe(args: CacheArgs) -> Recipe:
    """The recipe, its models pinned. Raises InputError where nothing of it can be written down."""
    recipe = load_recipe(args.recipe, args.overrides)
    teacher = recipe.live_teacher
    if teacher is None or teacher.delta is not None or teacher.vocabulary == "grown":
        problem = ("has no `teacher` that is a model" if teacher is None
                   else "has a `teacher.delta`, which follows the student's own start"
                   if teacher.delta is not None
                   else "has `teacher.vocabulary: grown`, and the teacher knows other ids")
        raise InputError(f"the recipe {args.recipe} {problem}",
                         "a model that says by itself what is written down",
                         "name such a one in the place of it: 'teacher={model: …}'")
    if recipe.data.streams:
        raise InputError(f"the recipe {args.recipe} has `stream: true`",
                         "rows that are prepared: each has its number",
                         "set stream: false for every source of data.train")
    recipe = pin(recipe)
    # No optimizer step is made: any micro-batch will do.
    batch = {"global_batch_size": recipe.train.micro_batch_size}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=batch)})


def check_cache(args: CacheArgs, recipe: Recipe, ranks: int, headers: bool = True) -> CacheTask:
    """The task, after every check that needs neither a weight nor prepared data.

    recipe: of `load_cache_recipe`; headers: read those of the teacher's weight files too. Raises
    InputError.
    """
    teacher = recipe.live_teacher
    assert teacher is not None
    ds_config.data_parallel_size(recipe, ranks)
    config = ds_config.read_deepspeed_config(recipe, data_parallel=1)
    check_places(recipe)
    check_sources(recipe.data)
    student = resolve_student(recipe)
    tokenizer = load_tokenizer(student.model, **student.hub_kwargs)
    require_same_tokenizer(tokenizer, load_tokenizer(teacher.model, **teacher.hub_kwargs),
                           student.model, teacher.model)
    args.layout(vocabulary_size(tokenizer))
    look = require_supported if headers else supported_model
    meta = look(teacher.model, **teacher.hub_kwargs)
    require_rows(meta, "the teacher", vocabulary_size(tokenizer))
    require_positions(meta, "the teacher", recipe.train.seq_length)
    task = CacheTask(args, recipe, teacher, tokenizer, config)
    check_cache_place(recipe, task.out)
    return task


def plan_cache(task: CacheTask) -> TargetManifest:
    """The plan of the folder; the data are prepared for it. On rank 0."""
    recipe, args = task.recipe, task.args
    prepare_all(recipe.data, recipe.train.seq_length, task.tokenizer, recipe.prepared_dir,
                run_lease=RunFolder(Path(recipe.output_dir)).lease)
    prepared = read_prepared_manifest(recipe.prepared_dir)
    assert prepared is not None
    rows = sum(source["rows"] for source in prepared["sources"])
    positions = sum(source["tokens"] for source in prepared["sources"])
    layout, size = args.layout(task.vocab_size), recipe.train.micro_batch_size
    dtype = task.teacher.dtype
    if dtype == "auto":
        stored = checkpoint_dtype(task.teacher.model, **task.teacher.hub_kwargs)
        dtype_name = str(stored).removeprefix("torch.")
    else:
        dtype_name = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    return TargetManifest(
        format=TARGET_FORMAT, method="sample" if layout.sampled else "topk",
        k=None if layout.sampled else layout.entries, draws=args.sample,
        exponent=(args.exponent or 1.0) if layout.sampled else None,
        seed=recipe.train.seed if layout.sampled else None, vocab_size=task.vocab_size, rows=rows,
        positions=positions, shard_rows=rows_of_a_shard(rows, positions, layout, size),
        micro_batch_size=size, data_sha256=prepared_hash(recipe.prepared_dir),
        tokenizer_sha256=tokenizer_fingerprint(task.tokenizer),
        teacher_sha256=model_hash(task.teacher.model), teacher=task.teacher.model,
        revision=task.teacher.revision, teacher_dtype=dtype_name)


def rows_of_a_shard(rows: int, positions: int, layout: TargetLayout, micro_batch: int) -> int:
    """Whole micro-batches that make about one of SHARDS shards, none larger than MAX_SHARD_BYTES
    unless a single micro-batch is."""
    row_bytes = positions / rows * layout.position_bytes + ROW_BYTES
    most = min(-(-rows // SHARDS), int(MAX_SHARD_BYTES / row_bytes))
    return max(1, most // micro_batch) * micro_batch


def folder_bytes(rows: int, positions: int, layout: TargetLayout) -> int:
    """Bytes of a folder: of topk nearly exactly, of sample at most."""
    return int(rows * ROW_BYTES + positions * layout.position_bytes)


def require_cache_room(work: TargetWork) -> None:
    """Raise InputError where the disk has no room for the shards that nobody has written yet."""
    manifest = work.manifest
    left = sum(len(manifest.shard_range(shard)) for shard in work.missing())
    needed = folder_bytes(manifest.rows, manifest.positions, manifest.layout) * left
    require_disk_space(work.folder, needed // manifest.rows, f"the cache {work.folder}",
                       "keep less: --topk K or --sample N, or name another --out")


@dataclass(frozen=True)
class CacheSize:
    """The size of a folder before it is written, as `plan --cache --json` has it.

    bytes_per_position, bytes: of samples at most; rows, positions, bytes: None before the data are
    prepared.
    """

    kept: str
    vocab_size: int
    bytes_per_position: float
    rows: int | None = None
    positions: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        most = "at most " if self.kept.startswith("sample") else ""
        each = (f"{self.kept} of {self.vocab_size:,} ids: {most}{self.bytes_per_position:,.1f} "
                "bytes a position")
        if self.bytes is None:
            return (f"{each}, {self.bytes_per_position:,.1f} GB for 10^9 of them; `amid-ds prepare`"
                    " counts them")
        return (f"{each}, {most}{self.bytes / 1e6:,.1f} MB for {self.positions:,} positions of "
                f"{self.rows:,} rows")


def cache_size(args: CacheArgs) -> CacheSize:
    """The size of the folder that `cache` with these arguments writes. Raises InputError."""
    recipe = load_cache_recipe(args)
    student = resolve_student(recipe)
    vocab_size = vocabulary_size(load_tokenizer(student.model, **student.hub_kwargs))
    layout = args.layout(vocab_size)
    kept = f"{'sample' if layout.sampled else 'topk'} {layout.entries}"
    prepared = read_prepared_manifest(recipe.prepared_dir)
    if prepared is None:
        return CacheSize(kept, vocab_size, layout.position_bytes)
    rows, positions = (sum(source[name] for source in prepared["sources"])
                       for name in ("rows", "tokens"))
    return CacheSize(kept, vocab_size, layout.position_bytes, rows, positions,
                     folder_bytes(rows, positions, layout))
