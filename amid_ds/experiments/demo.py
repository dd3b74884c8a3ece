"""`amid-ds demo`: the whole job on this machine, in minutes, without a network or a GPU.

Nothing in it is special: the corpus is the source of Python's standard library on the user's own
disk; the teacher, the distilled student and the student trained with cross entropy are made by
`train` under the `deepspeed` launcher on two ranks, by recipes that are left behind to be edited.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import sysconfig
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds.checkpoint.export import export
from amid_ds.config.strict import dump_yaml
from amid_ds.data import load_tokenizer, train_sentencepiece
from amid_ds.distributed.launch import launch_command
from amid_ds.distributed.leash import start_on_leash
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval import evaluate
from amid_ds.eval.protocol import EvalArgs, EvalProtocol
from amid_ds.experiments.picture import draw_picture
from amid_ds.experiments.reported_run import read_reported_runs
from amid_ds.experiments.small_models import LlamaSize, save_new_llama
from amid_ds.files.ownership import require_new_folder

logger = logging.getLogger(__name__)

RANKS = 2
VOCABULARY = 2048
SEQ_LENGTH = 256
HELD_OUT_ONE_IN = 20
# Characters of the corpus' two parts; the demo itself holds out fewer than the studies.
HELD_OUT_BYTES = 80_000
DEMO_HELD_OUT_BYTES = 24_000
CORPUS_BYTES = 4_000_000
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3",
                   "ensurepip", "__pycache__"}
TEACHER = LlamaSize(256, 688, 4, 4)
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


def demo(out: str, seed: int) -> None:
    """Run everything under `out`, a new or empty folder; end with a table and `summary.json`."""
    began = time.monotonic()
    root = Path(out)
    require_new_folder(root, "--out")
    root.mkdir(parents=True, exist_ok=True)
    folder = DemoFolder(root)
    _announce(1, "corpus: the Python standard library's source on this disk")
    train_file, held_out = make_corpus(root, DEMO_HELD_OUT_BYTES)
    _announce(2, "tokenizer: SentencePiece, trained on the corpus")
    tokenizer = _make_tokenizer(train_file, folder.tokenizer)
    save_new_llama(folder.initial_model("teacher"), TEACHER, tokenizer, seed)
    save_new_llama(folder.initial_model("student"), STUDENT, tokenizer, seed + 1)
    _announce(3, "teacher: trained by this project's own `train`, with cross entropy alone")
    _train(folder, "teacher", train_file, "teacher", None, {**TEACHER_TRAIN, "seed": seed})
    _announce(4, "student: distilled from the teacher with AMiD")
    _train(folder, "distilled", train_file, "student", "teacher", {**STUDENT_TRAIN, "seed": seed})
    _announce(5, "for comparison: the same student, data and steps with cross entropy alone")
    _train(folder, "ce", train_file, "student", "teacher", {**STUDENT_TRAIN, "seed": seed})
    _announce(6, "evaluation on held-out files")
    scores = _evaluate(folder, tokenizer, held_out)
    summary = {name: score.report() for name, score in scores.items()}
    folder.summary.write_text(json.dumps(summary, indent=1) + "\n")
    evaluate.print_table(scores)
    picture = _draw_picture(folder)
    _print_next_steps(folder, picture, time.monotonic() - began)


def _announce(number: int, title: str) -> None:
    logger.info(f"\n[{number}/6] {title}")


def make_corpus(root: Path, held_out_bytes: int | None = None) -> tuple[Path, Path]:
    """Write the corpus under `root`; the paths of its training and held-out jsonl.

    A file's name alone decides its part, so every machine splits alike. held_out_bytes: about as
    many characters are held out; None: HELD_OUT_BYTES.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    room = {"train": CORPUS_BYTES, "heldout": held_out_bytes or HELD_OUT_BYTES}
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
    if not train or not held_out:
        raise InputError(f"{stdlib} holds too few Python source files",
                         "the standard library as source",
                         "run with a Python that has it; on Debian: apt-get install "
                         "libpython3-stdlib")
    corpus = root / "corpus"
    corpus.mkdir()
    return (_write_rows(corpus / "train.jsonl", train),
            _write_rows(corpus / "heldout.jsonl", held_out))


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    characters = sum(len(row["text"]) for row in rows)
    logger.info(f"  {path}: {len(rows)} files, {characters / 1e6:.2f} MB")
    return path


def _source_files(stdlib: Path) -> list[Path]:
    """The library's own files, in an order by hash: a corpus cut short is a fair sample."""
    paths = [path for path in stdlib.rglob("*.py")
             if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts)]
    return sorted(paths, key=lambda path: zlib.crc32(
        str(path.relative_to(stdlib)).encode("utf-8", "replace")))


def _make_tokenizer(train_file: Path, folder: Path) -> Any:
    with open(train_file, encoding="utf-8") as rows:
        train_sentencepiece((json.loads(row)["text"] for row in rows), folder, VOCABULARY)
    return load_tokenizer(str(folder))


def _train(folder: DemoFolder, name: str, corpus: Path, student: str, teacher: str | None,
           train: Mapping[str, object]) -> None:
    """Write the recipe, start it under the `deepspeed` launcher as a user would, and export.

    `student` names an initial model, `teacher` a trained one, beside which it is judged.
    """
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
    command = launch_command(RANKS, "train", str(path))
    logger.info("  " + " ".join(command))
    # A machine's one GPU cannot serve two ranks.
    with start_on_leash(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}) as process:
        status = process.wait()
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


def _print_next_steps(folder: DemoFolder, picture: Path | None, seconds: float) -> None:
    programs = Path(sys.executable).parent
    root = folder.path
    drawn = f", the picture is {picture}" if picture else ""
    print(f"""
done in {seconds / 60:.1f} minutes; the numbers are in {folder.summary}{drawn}. To go on:
  {programs / 'tensorboard'} --logdir {root / 'runs'}
  {programs / 'deepspeed'} --num_gpus {RANKS} --module amid_ds train {folder.recipe('distilled')} \\
      loss.lam=0.5 output_dir={folder.run('mine')}
  {programs / 'amid-ds'} export {folder.run('mine')} {folder.model('mine')}
  {programs / 'amid-ds'} eval {folder.model('mine')} --teacher {folder.model('teacher')} \\
      --data {folder.held_out} --seq-length {SEQ_LENGTH}
  {programs / 'amid-ds'} report {folder.run('distilled')} {folder.run('ce')}""")
