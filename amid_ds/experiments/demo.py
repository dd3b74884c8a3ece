"""`amid-ds demo`: the whole job on this machine, in minutes, without a network or a GPU.

Nothing in it is special: the corpus is the source of Python's standard library on the user's own
disk; the teacher, the distilled student and the student trained with cross entropy are made by
`train` on two ranks, by recipes that are left behind to be edited.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds.checkpoint.export import export
from amid_ds.config.strict import dump_yaml
from amid_ds.data import load_tokenizer, train_sentencepiece
from amid_ds.distributed.forked_ranks import preload_ranks, run_forked_ranks
from amid_ds.errors import ExitStatus, InputError, Stopped, TrainingError
from amid_ds.eval import evaluate
from amid_ds.eval.protocol import EvalArgs, EvalProtocol
from amid_ds.experiments.picture import draw_picture
from amid_ds.experiments.progress import PRODUCT_SIZE, PartsProgress, duration
from amid_ds.experiments.reported_run import read_reported_runs
from amid_ds.experiments.small_models import LlamaSize, save_new_llama
from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import Lease
from amid_ds.files.ownership import is_signed, require_new_folder, sign

logger = logging.getLogger(__name__)

RANKS = 2
VOCABULARY = 2048
SEQ_LENGTH = 256
HELD_OUT_ONE_IN = 20
# Characters to train on and to hold out, whole files: the last one may go beyond.
CORPUS_CHARACTERS = 4_000_000
HELD_OUT_CHARACTERS = 24_000
# Of CORPUS_CHARACTERS, so that no row is read twice by the last step.
LEAST_OF_CORPUS = 0.5
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3",
                   "ensurepip", "__pycache__"}
TEACHER = LlamaSize(256, 688, 3, 4)
STUDENT = LlamaSize(128, 344, 2, 4)
OBJECTIVE = {"alpha": -1.0, "lam": 0.1, "divergence": "kl", "order": "pr"}
# By the student's name. With cross entropy alone the teacher runs in evaluations.
LOSSES = {"distilled": OBJECTIVE, "ce": {"kd_weight": 0.0, "ce_weight": 1.0}}
TRAIN = {"seq_length": SEQ_LENGTH, "micro_batch_size": 4, "global_batch_size": 8,
         "warmup_steps": 10}
# Of the front page's table.
ADAMW = {"learning_rate": 2.0e-3, "betas": [0.9, 0.999], "weight_decay": 0.01, "decay_all": True}
TEACHER_TRAIN = {**TRAIN, **ADAMW, "steps": 200}
STUDENT_TRAIN = {**TRAIN, **ADAMW, "steps": 160}
# What the picture shows of both students.
WATCHED = {"eval_every": 40, "samples": 4}
# What each part takes on two cores, in products of matrices (progress.py); time.json has what it
# took.
PART_PRODUCTS = {"corpus": 5, "tokenizer": 50, "teacher": 860, "distilled": 640, "ce": 355,
                 "evaluation": 55}


@dataclass(frozen=True)
class DemoFolder:
    """The names in the demo's folder."""

    path: Path

    @property
    def held_out(self) -> Path:
        return self.path / "corpus" / "heldout.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def time(self) -> Path:
        return self.path / "time.json"

    @property
    def picture(self) -> Path:
        return self.path / "demo.png"

    def initial_model(self, name: str) -> Path:
        """The model before training."""
        return self.path / "init" / name

    def model(self, name: str) -> Path:
        """The trained model."""
        return self.path / "models" / name

    def run(self, name: str) -> Path:
        """The folder of the training's run."""
        return self.path / "runs" / name

    def recipe(self, name: str) -> Path:
        """The training's recipe."""
        return self.path / "recipes" / f"{name}.yaml"


def demo(out: str, seed: int, began: float | None = None) -> None:
    """Run everything under `out`; end with a table and `summary.json`.

    out: a new or empty folder, or one that a demo with this seed has begun in: it goes on there.
    began: when the command did, by time.monotonic(); None: now. time.json there says what it took
    (PartsProgress.end). Raises InputError, TrainingError, Stopped.
    """
    root = Path(out)
    folder = DemoFolder(root)
    kind = f"demo with seed {seed}"
    is_new = not is_signed(root, kind)
    if is_new or folder.summary.exists():
        require_new_folder(root, "--out")
    # A machine's one GPU cannot serve two ranks.
    os.environ["DS_ACCELERATOR"] = "cpu"
    sign(root, kind)
    with Lease.held(root / "lease.json", f"--out {out}"):
        progress = PartsProgress(PART_PRODUCTS, began)
        preload_ranks()
        try:
            scores = _make_everything(folder, seed, progress)
            picture = _draw_picture(folder)
        except KeyboardInterrupt:
            logger.info("interrupted; the same command goes on from there")
            raise Stopped from None
        took = progress.end()
        replace_text(folder.time, _json(took))
        # The last one: with it the demo is done.
        replace_text(folder.summary,
                     _json({name: score.report() for name, score in scores.items()}))
    evaluate.print_table(scores)
    # What an earlier attempt took is not known.
    time = "" if not is_new else (
        f" in {duration(took['seconds'])}, the time of {took['matrix_products']:,.0f} products of "
        f"two matrices of {PRODUCT_SIZE} × {PRODUCT_SIZE} on this machine")
    print(f"\ndone{time}")
    _print_next_steps(folder, picture)


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def _make_everything(folder: DemoFolder, seed: int,
                     progress: PartsProgress) -> dict[str, evaluate.Scores]:
    """The scores of the three models, by name; what is there already is not made again."""
    progress.begin("corpus", "corpus: the Python standard library's source on this disk")
    train_file, held_out = make_corpus(folder.path, HELD_OUT_CHARACTERS)
    progress.begin("tokenizer", "tokenizer: SentencePiece, trained on the corpus")
    tokenizer = _make_tokenizer(train_file, folder.tokenizer)
    save_new_llama(folder.initial_model("teacher"), TEACHER, tokenizer, seed)
    save_new_llama(folder.initial_model("student"), STUDENT, tokenizer, seed + 1)
    progress.begin("teacher", "teacher: trained by this project's own `train`, with cross entropy "
                   "alone")
    _train(folder, "teacher", train_file, "teacher", None, {**TEACHER_TRAIN, "seed": seed},
           progress)
    progress.begin("distilled", "student: distilled from the teacher with AMiD")
    _train(folder, "distilled", train_file, "student", "teacher", {**STUDENT_TRAIN, "seed": seed},
           progress)
    progress.begin("ce", "for comparison: the same student, data and steps with cross entropy "
                   "alone")
    _train(folder, "ce", train_file, "student", "teacher", {**STUDENT_TRAIN, "seed": seed},
           progress)
    progress.begin("evaluation", "evaluation on held-out files")
    return _evaluate(folder, tokenizer, held_out)


def make_corpus(root: Path, held_out_characters: int) -> tuple[Path, Path]:
    """Write the corpus under `root`; the paths of its training and held-out jsonl.

    A file's name alone decides its part, so every machine splits alike. What an earlier attempt
    has written stays. Raises InputError for a library with too little source.
    """
    files = root / "corpus" / "train.jsonl", root / "corpus" / "heldout.jsonl"
    if files[1].exists():
        # Written after the other one, by an earlier attempt.
        return files
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    room = {"train": CORPUS_CHARACTERS, "heldout": held_out_characters}
    for path in _source_files(stdlib):
        name = str(path.relative_to(stdlib))
        is_held_out = zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0
        part, rows = ("heldout", held_out) if is_held_out else ("train", train)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            # Not every machine lets every file be read.
            continue
        if text.strip() and room[part] > 0:
            rows.append({"text": text, "file": name})
            room[part] -= len(text)
    found, least = CORPUS_CHARACTERS - room["train"], CORPUS_CHARACTERS * LEAST_OF_CORPUS
    if found < least or not held_out:
        raise InputError(f"{stdlib} holds {found / 1e6:.2f} MB of Python source files to train on",
                         f"the standard library as source, {least / 1e6:.2f} MB of it",
                         "run with a Python that has it; on Debian: apt-get install "
                         "libpython3-stdlib")
    files[0].parent.mkdir(exist_ok=True)
    _write_rows(files[0], train)
    _write_rows(files[1], held_out)
    return files


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    characters = sum(len(row["text"]) for row in rows)
    logger.info(f"  {path}: {len(rows)} files, {characters:,} characters")


def _source_files(stdlib: Path) -> list[Path]:
    """The library's own files, in an order by hash: a corpus cut short is a fair sample."""
    paths = [path for path in stdlib.rglob("*.py")
             if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts)]
    return sorted(paths, key=lambda path: zlib.crc32(
        str(path.relative_to(stdlib)).encode("utf-8", "replace")))


def _make_tokenizer(train_file: Path, folder: Path) -> Any:
    if not folder.exists():
        with open(train_file, encoding="utf-8") as rows:
            train_sentencepiece((json.loads(row)["text"] for row in rows), folder, VOCABULARY)
    return load_tokenizer(str(folder))


def _train(folder: DemoFolder, name: str, corpus: Path, student: str, teacher: str | None,
           train: Mapping[str, object], progress: PartsProgress) -> None:
    """Write the recipe, run it on RANKS ranks, and export; what an earlier attempt has exported
    stays.

    `student` names an initial model, `teacher` a trained one, beside which it is judged.
    """
    if folder.model(name).is_dir():
        progress.skip(f"{folder.model(name)} is there")
        return
    data: dict[str, object] = {"train": [{"path": str(corpus), "text": "text"}],
                               "prepared": str(folder.path / "data"), "workers": 0}
    recipe: dict[str, object] = {
        "student": {"model": str(folder.initial_model(student))},
        "data": data,
        "train": {**train, **(WATCHED if teacher is not None else {})},
        "deepspeed": "ds_configs/zero3_fp32.json",
        "checkpoint": {"every": 100},
        "output_dir": str(folder.run(name)),
    }
    if teacher is not None:
        recipe |= {"teacher": {"model": str(folder.model(teacher))}, "loss": LOSSES[name]}
        data["eval"] = [{"path": str(folder.held_out), "text": "text"}]
    path = folder.recipe(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(dump_yaml(recipe))
    logger.info("  as: " + shlex.join(["deepspeed", "--num_gpus", str(RANKS), "--module",
                                        "amid_ds", "train", str(path)]))
    status = run_forked_ranks(RANKS, ["train", str(path)], {"DS_ACCELERATOR": "cpu"})
    if status == ExitStatus.RESTART:
        raise Stopped
    if status:
        raise TrainingError(f"the training of {name} ended with status {status}; its messages are "
                            "above")
    export(folder.run(name), folder.model(name))


def _evaluate(folder: DemoFolder, tokenizer: Any, held_out: Path) -> dict[str, evaluate.Scores]:
    models = {name: evaluate.load_model(str(folder.model(name)))
              for name in ("teacher", "distilled", "ce")}
    protocol = EvalProtocol(seq_length=SEQ_LENGTH)
    return {name: evaluate.evaluate(EvalArgs(name, "teacher", str(held_out), protocol), model,
                                    models["teacher"], tokenizer)
            for name, model in models.items()}


def _draw_picture(folder: DemoFolder) -> Path | None:
    """Draw demo.png, as `amid-ds report --picture` does; its path, or None without matplotlib."""
    try:
        draw_picture(read_reported_runs([folder.run(name) for name in LOSSES]), folder.picture)
    except InputError as error:
        logger.info(f"  no picture: {error}")
        return None
    return folder.picture


def _print_next_steps(folder: DemoFolder, picture: Path | None) -> None:
    programs, root = Path(sys.executable).parent, folder.path
    amid_ds, mine = programs / "amid-ds", folder.run("mine")
    drawn = f", the picture is {picture}" if picture else ""
    commands = [
        [amid_ds, "chat", folder.model("distilled"), "--beside", folder.model("teacher")],
        [programs / "tensorboard", "--logdir", root / "runs"],
        [programs / "deepspeed", "--num_gpus", RANKS, "--module", "amid_ds", "train",
         folder.recipe("distilled"), "loss.lam=0.5", f"output_dir={mine}"],
        [amid_ds, "export", mine, folder.model("mine")],
        [amid_ds, "eval", folder.model("mine"), "--teacher", folder.model("teacher"), "--data",
         folder.held_out, "--seq-length", SEQ_LENGTH]]
    print(f"the numbers are in {folder.summary}{drawn}. To go on:")
    for command in commands:
        print("  " + shlex.join(map(str, command)))
