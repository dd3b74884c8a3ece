"""`amid-ds prune`: a student cut from its teacher, as an ordinary folder.

All ranks run the teacher on calibration rows; then rank 0 chooses what stays and cuts the teacher's
tensors one by one, in memory for one file and one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amid_ds.checkpoint.card import CARD_FILE, license_fields, new_card, without_places
from amid_ds.checkpoint.export import own_card, write_model_configs
from amid_ds.config.recipe import Data, Student, Teacher
from amid_ds.data import Batch, check_sources, load_tokenizer, vocabulary_size
from amid_ds.data.batch import TokenRow, collate_rows
from amid_ds.data.encode import first_rows
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine.build import build_teacher_engine
from amid_ds.errors import InputError, printable
from amid_ds.eval.importance import (
    Importance,
    ImportanceHooks,
    best,
    channel_scores,
    hidden_norms,
    kept_layers,
)
from amid_ds.eval.rows import RowOptions
from amid_ds.files.atomic import require_disk_space
from amid_ds.files.ownership import new_folder, require_new_folder
from amid_ds.losses import IGNORE_INDEX
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.fit import require_rows
from amid_ds.models.loading import (
    checkpoint_dtype,
    load_causal_lm,
    model_config,
    open_weights,
    require_supported,
    resolved_commit,
)
from amid_ds.models.pruning import (
    Cut,
    ModelSizes,
    PrunedFamily,
    even_layers,
    group_count,
    head_width,
    pruned_config,
    pruned_family,
    pruned_sizes,
    read_cut,
    read_rows,
    require_known_parameters,
    row_blocks,
    scaled_embedding_ratio,
)
from amid_ds.models.weight_reader import WeightReader
from amid_ds.models.weight_writer import write_weights
from amid_ds.models.weights import refuse_other_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PRUNE_TIMEOUT_S = 1800.0
# Of calibration, that share a forward pass.
ROWS_PER_PASS = 4
# By which a teacher that several ranks run is sharded.
SHARDED: dict[str, object] = {"train_micro_batch_size_per_gpu": 1,
                              "zero_optimization": {"stage": 3}}


@dataclass(frozen=True)
class PruneArgs:
    """The arguments of `amid-ds prune`; see its --help. rows: what the file's rows are."""

    teacher: str
    out: str
    data: str | None
    rows: RowOptions
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    by: Literal["activations", "depth"] = "activations"
    calibration_rows: int = 256
    seq_length: int = 512
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PruneTask:
    """Validated arguments, and what they resolve to.

    meta: the teacher without weights; sizes: the student's; data: the rows to judge by, None where
    nothing is.
    """

    args: PruneArgs
    teacher: Teacher
    meta: Any
    family: PrunedFamily
    sizes: ModelSizes
    data: Data | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def own(self) -> ModelSizes:
        """The teacher's sizes."""
        return ModelSizes.of(self.meta.config)

    @property
    def dtype(self) -> torch.dtype:
        """The teacher's, in which it runs."""
        return checkpoint_dtype(self.teacher.model, **self.teacher.hub_kwargs)

    @property
    def seq_length(self) -> int:
        """Tokens in a row to judge by: no more than the teacher has positions for."""
        asked = self.args.seq_length
        return min(asked, getattr(self.meta.config, "max_position_embeddings", None) or asked)


def prune(args: PruneArgs) -> None:
    """`amid-ds prune`, on every rank of any launcher. Raises InputError."""
    with init_distributed(PRUNE_TIMEOUT_S) as world:
        task = world.run_checked(lambda: check_prune(args))
        # Before any row is run; it may download, for as long as it takes.
        world.run_on_main(lambda: _open_reader(task) and None)
        importance = None if task.data is None else measure_importance(task, world)
        world.run_on_main(lambda: write_pruned(task, importance))
        logger.info(f"{args.out}: {_described(task.sizes)}, cut from {args.teacher}")


def check_prune(args: PruneArgs) -> PruneTask:
    """The task of the arguments, checked without reading a weight. Raises InputError."""
    require_new_folder(args.out, "the output")
    commit = resolved_commit(args.teacher)
    teacher = Teacher(model=args.teacher, revision=commit, trust_remote_code=args.trust_remote_code)
    family = pruned_family(args.teacher, model_config(teacher.model, **teacher.hub_kwargs))
    meta: Any = require_supported(teacher.model, **teacher.hub_kwargs)
    require_known_parameters(args.teacher, meta, family)
    sizes = pruned_sizes(meta.config, layers=args.layers, hidden=args.hidden,
                         intermediate=args.intermediate, heads=args.heads)
    tokenizer = load_tokenizer(teacher.model, **teacher.hub_kwargs)
    require_rows(meta, f"the teacher {args.teacher}", vocabulary_size(tokenizer))
    data = _calibration_data(args, ModelSizes.of(meta.config), sizes)
    task = PruneTask(args, teacher, meta, family, sizes, data, tokenizer)
    # Whichever layers are kept, their number is what config and disk depend on.
    parameters = student_model(task, range(sizes.layers)).parameters()
    existing = next(path for path in Path(args.out).absolute().parents if path.is_dir())
    require_disk_space(existing, sum(p.numel() for p in parameters) * task.dtype.itemsize,
                       f"pruning {args.teacher} to {args.out}", "choose a folder elsewhere")
    return task


def _calibration_data(args: PruneArgs, own: ModelSizes, sizes: ModelSizes) -> Data | None:
    """The rows that decide what goes; None where they decide nothing. Raises InputError."""
    for option, value in (("--rows", args.calibration_rows), ("--seq-length", args.seq_length)):
        if value < 1:
            raise InputError(f"{option} {value}", "1 or more", f"give {option} such a number")
    if args.by == "depth" and sizes.width != own.width:
        raise InputError("--by depth with --hidden, --intermediate or --heads",
                         "--layers alone: depth says nothing of a layer's parts",
                         "leave it out and give --data FILE; or cut the layers first, and then the "
                         "result's width by activations")
    if args.by == "depth" and args.data is not None:
        raise InputError(f"--by depth with --data {args.data}", "one of them: no text is read then",
                         "leave one out")
    if args.by == "activations" and args.data is None and sizes != own:
        raise InputError("no --data, and activations decide what is dropped",
                         "text of the kind that the student is for",
                         "give --data FILE, or where only layers go --by depth")
    if args.data is None or sizes == own:
        return None
    data = args.rows.data(args.data)
    check_sources(data)
    return data


def measure_importance(task: PruneTask, world: World) -> Importance:
    """The sums over the calibration rows. Collective."""
    assert task.data is not None
    data = task.data
    rows = world.run_checked(
        lambda: first_rows(data, task.seq_length, task.tokenizer, task.args.calibration_rows))
    with _opened(task.teacher, world) as (model, reset):
        with ImportanceHooks(model, task.family, world.device) as hooks:
            batches = list(calibration_batches(rows, world.rank, world.size))
            for batch in tqdm(batches, desc="calibrate", disable=not world.is_main or None):
                reset()
                world.run_checked(functools.partial(hooks.measure, batch.to(world.device)))
        return hooks.result(world)


def calibration_batches(rows: Sequence[TokenRow], rank: int, size: int) -> Iterator[Batch]:
    """A rank's batches: of each `size` consecutive ones its own, so all ranks have as many.

    After the last rows a rank gets the first ones without labels.
    """
    for start in range(0, len(rows), ROWS_PER_PASS * size):
        first = start + rank * ROWS_PER_PASS
        numbers = list(range(first, min(first + ROWS_PER_PASS, len(rows))))
        batch = collate_rows([rows[number] for number in numbers or [0]], numbers)
        yield batch if numbers else dataclasses.replace(
            batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))


@contextlib.contextmanager
def _opened(teacher: Teacher, world: World) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """A context with the teacher in eval mode, whole on one rank, else sharded, and with what is to
    be called before each pass."""
    if world.size == 1:
        model = load_causal_lm(teacher.model, teacher.dtype, **teacher.hub_kwargs)
        yield model.to(world.device).eval(), lambda: None
        return
    engine = world.run_checked(lambda: build_teacher_engine(teacher, SHARDED, world))
    yield engine.module, engine.reset_prefetch


def choose_cut(task: PruneTask, importance: Importance | None, reader: WeightReader) -> Cut:
    """The parts of the teacher that stay. Reads the weights that heads and neurons go through."""
    config, own, sizes = task.meta.config, task.own, task.sizes
    if importance is None:
        return Cut(config, even_layers(own.layers, sizes.layers))
    layers = kept_layers(importance, sizes.layers)
    channels, embedding = None, 1.0
    if sizes.hidden < own.hidden:
        norms = [name for name in hidden_norms(task.meta, task.family)
                 if task.family.layer_of(name) in (None, *layers)]
        channels = best(channel_scores(importance, norms), sizes.hidden)
        embedding = scaled_embedding_ratio(config, sizes.hidden, task.dtype)
    neurons, groups = {}, {}
    for layer in layers:
        prefix = f"{task.family.layers}.{layer}."
        if sizes.intermediate < own.intermediate:
            weights = _input_norms(reader, f"{prefix}{task.family.neurons_out}.weight", task.family)
            neurons[layer] = best(importance.neurons[layer] * weights, sizes.intermediate)
        if sizes.heads < own.heads:
            weights = _input_norms(reader, f"{prefix}{task.family.heads_out}.weight", task.family)
            weights = weights.view(own.heads, head_width(config)).norm(dim=1)
            of_groups = (importance.heads[layer] * weights).view(group_count(config), -1).sum(1)
            groups[layer] = best(of_groups, len(of_groups) * sizes.heads // own.heads)
    return Cut(config, layers, channels, neurons, groups, embedding)


def _input_norms(reader: WeightReader, name: str, family: PrunedFamily) -> Tensor:
    """[n] fp64: the Euclidean norm of what a projection makes of each of its inputs."""
    source, axes = reader.sources[name], family.axes_of(name)
    assert axes is not None
    squares = torch.zeros(source.shape[1 - axes.index("hidden")], dtype=torch.float64)
    for start, stop in row_blocks(source):
        block = read_rows(reader, source, start, stop).double().square()
        if axes[0] == "hidden":
            squares += block.sum(0)
        else:
            squares[start:stop] = block.sum(1)
    return squares.sqrt()


def _open_reader(task: PruneTask) -> WeightReader:
    """A reader of the teacher's weights. Raises InputError where they can only be read whole."""
    reader = open_weights(task.teacher.model, **task.teacher.hub_kwargs)
    if isinstance(reader, str):
        raise InputError(f"the weights of {task.args.teacher} cannot be read one by one: {reader}",
                         "safetensors files of unquantized weights",
                         "load it with from_pretrained and save it anew with save_pretrained")
    return reader


def write_pruned(task: PruneTask, importance: Importance | None) -> None:
    """Choose what stays and write the student's folder, complete or not at all. On rank 0."""
    out = Path(task.args.out)
    with _open_reader(task) as reader, freed_memory_given_back():
        refuse_other_keys(task.args.teacher, {"untied": reader.unequal_twins(0, 1)})
        cut = choose_cut(task, importance, reader)
        student = student_model(task, cut.layers)
        hollow = {name: torch.empty(parameter.shape, device="meta",
                                    dtype=reader.sources[cut.of(name).source].dtype)
                  for name, parameter in student.named_parameters()}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(out) as staging:
                write_weights(student, hollow, lambda names: (read_cut(reader, cut.of(name))
                                                              for name in names), staging)
                origin = Student(**task.teacher.hub_kwargs, model=task.teacher.model)
                write_model_configs(origin, student, task.meta.config.dtype or task.dtype, staging)
                (staging / CARD_FILE).write_text(pruned_card(task, cut, own_card(origin)),
                                                 encoding="utf-8")
        except OSError as error:
            raise InputError(f"the student {out} could not be written: {error}",
                             "a folder that can be written, with room",
                             "make room there, or choose a folder elsewhere") from None


def student_model(task: PruneTask, layers: Sequence[int]) -> Any:
    """The meta model of the student, of these layers of the teacher. Raises InputError."""
    config = pruned_config(task.meta.config, task.sizes, layers)
    with torch.device("meta"):
        return type(task.meta)(config)


def pruned_card(task: PruneTask, cut: Cut, teachers: Path | None) -> str:
    """The text of the folder's README.md: from what this model was cut, and how. teachers: the
    teacher's own card."""
    args, changed = task.args, []
    rows = [f"| {name} | {before} | {after} |"
            for name, before, after in zip(ModelSizes._fields, task.own, task.sizes, strict=True)]
    if task.sizes.layers < task.own.layers:
        changed.append("Layers of the teacher that are left: "
                       + ", ".join(map(str, cut.layers)) + ".")
    if task.data is not None:
        changed.append("Chosen by the teacher's activations on no more than the first "
                       f"{args.calibration_rows} rows of {task.seq_length} tokens of "
                       f"`{without_places(args.data)}`.")
    elif task.sizes != task.own:
        changed.append("Layers are left at even distances.")
    revision = f" at {task.teacher.revision}" if task.teacher.revision else ""
    text = "\n\n".join([
        f"# {printable(Path(args.out).absolute().name, keep='')}",
        f"Cut from `{without_places(args.teacher)}`{revision} by `amid-ds prune`, to be distilled "
        "from it. It has not been trained since.",
        "| | teacher | this model |\n|---|---:|---:|\n" + "\n".join(rows), *changed])
    base = None if Path(args.teacher).is_dir() else args.teacher
    license_of_base = {} if teachers is None else license_fields(teachers, base)
    return str(new_card(text, ["pruning"], {"base_model": base, **license_of_base}))


def _described(sizes: ModelSizes) -> str:
    return ", ".join(f"{value} {name}" for name, value in sizes._asdict().items())
