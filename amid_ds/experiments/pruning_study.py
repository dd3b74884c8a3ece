"""`amid-ds study pruning`: does a student cut from its teacher begin and end nearer to it?

On the demo's corpus and with its training: a student that `prune` makes, and one of the
same shape with random weights, distilled for as many steps on the same rows, several seeds each.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amid_ds.config.grid import path_override
from amid_ds.config.library import find_recipe
from amid_ds.data import load_tokenizer, train_sentencepiece
from amid_ds.distributed.launch import launch_command
from amid_ds.errors import TrainingError
from amid_ds.eval import evaluate
from amid_ds.eval.protocol import EvalArgs, EvalProtocol
from amid_ds.experiments import demo
from amid_ds.experiments.small_models import LlamaSize, save_new_llama
from amid_ds.experiments.study import (
    STUDY_HELD_OUT_CHARACTERS,
    mean_cell,
    open_study,
    read_texts,
)
from amid_ds.experiments.sweep import markdown_table, run_logged, run_one
from amid_ds.files.atomic import replace_text
from amid_ds.run.folder import RunFolder

logger = logging.getLogger(__name__)

# The teacher, of the demo's width, and the options of `prune`: half of its layers, channels and
# neurons, so that the student is about the demo's.
FULL_TEACHER = LlamaSize(256, 688, 4, 4)
CUT = {"layers": 2, "hidden": 128, "intermediate": 344}
STARTS = ("pruned", "random")


def pruning_study(out: str, seeds: int) -> None:
    """Run everything under `out`; end with the table, pruning.md there."""
    root = open_study(out, seeds, "pruning study")
    train, held_out, tokenizer = _inputs(root)
    teacher = _train(root, "teacher", root / "init" / "teacher", train, demo.TEACHER_TRAIN, 0)
    pruned = _prune(root, teacher, train)
    judge = evaluate.load_model(str(teacher))
    scores: dict[str, list[Mapping[str, float]]] = {start: [] for start in STARTS}
    for seed in range(seeds):
        for start in STARTS:
            first = pruned if start == "pruned" else _random(root, pruned, tokenizer, seed)
            last = _train(root, f"{start}-{seed}", first, train, demo.STUDENT_TRAIN, seed, teacher)
            scores[start].append({
                f"{name} {when}": value for when, model in (("before", first), ("after", last))
                for name, value in _scores(model, judge, tokenizer, held_out).items()})
    table = pruning_table(scores)
    replace_text(root / "pruning.md", table)
    print(f"\n{table}\nthe table is {root / 'pruning.md'}", flush=True)


def _inputs(root: Path) -> tuple[Path, Path, Any]:
    """(training rows, held-out rows, tokenizer), made once, and the untrained teacher."""
    train, held_out = (root / "corpus" / f"{part}.jsonl" for part in ("train", "heldout"))
    if not (root / "init" / "teacher" / "config.json").exists():
        # What a killed start has left.
        for name in ("corpus", "tokenizer", "init"):
            shutil.rmtree(root / name, ignore_errors=True)
        demo.make_corpus(root, STUDY_HELD_OUT_CHARACTERS)
        train_sentencepiece(read_texts(train), root / "tokenizer", demo.VOCABULARY)
        tokenizer = load_tokenizer(str(root / "tokenizer"))
        save_new_llama(root / "init" / "teacher", FULL_TEACHER, tokenizer, seed=0)
    return train, held_out, load_tokenizer(str(root / "tokenizer"))


def _train(root: Path, name: str, model: Path, corpus: Path, train: Mapping[str, object], seed: int,
           teacher: Path | None = None) -> Path:
    """Train `model` with the demo's settings, once; the trained model's folder."""
    run = RunFolder(root / "runs" / name)
    values = {**train, "seed": seed, "micro_batch_size": demo.TRAIN["global_batch_size"]}
    overrides = [path_override("student.model", model),
                 "teacher=null" if teacher is None else path_override("teacher.model", teacher),
                 path_override("data.train.0.path", corpus),
                 path_override("data.prepared", root / "data"), "data.eval=[]",
                 *(f"train.{key}={value}" for key, value in values.items()),
                 *(f"loss.{key}={value}" for key, value in demo.OBJECTIVE.items()),
                 path_override("output_dir", run.path)]
    if run_one(name, str(find_recipe("study")), overrides, 1):
        raise TrainingError(f"the training of {name} failed")
    return run.model


def _prune(root: Path, teacher: Path, corpus: Path) -> Path:
    """Cut the student from the teacher, once; its folder."""
    out = root / "init" / "pruned"
    options = [word for name, value in CUT.items() for word in (f"--{name}", str(value))]
    command = launch_command(1, "prune", str(teacher), str(out), *options, "--data", str(corpus),
                             "--seq-length", str(demo.SEQ_LENGTH))
    if not out.is_dir() and run_logged(command, root / "prune.log"):
        raise TrainingError("the student could not be cut")
    return out


def _random(root: Path, like: Path, tokenizer: Any, seed: int) -> Path:
    """Save a model of the shape of `like` with random weights of this seed, once; its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    out = root / "init" / f"random-{seed}"
    if not (out / "tokenizer_config.json").exists():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like))
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out


def _scores(model: Path, teacher: nn.Module, tokenizer: Any, held_out: Path) -> dict[str, float]:
    """KL to the teacher and loss of a model on the held-out rows."""
    args = EvalArgs(str(model), None, str(held_out), EvalProtocol(seq_length=demo.SEQ_LENGTH))
    scores = evaluate.evaluate(args, evaluate.load_model(str(model)), teacher, tokenizer)
    assert scores.kl_to_teacher is not None and scores.loss is not None
    return {"KL to the teacher": scores.kl_to_teacher, "loss": scores.loss}


def pruning_table(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line for each start: means over the seeds, with standard errors of several."""
    columns = list(next(iter(scores.values()))[0])
    return markdown_table(["student", *columns],
                          [[start, *(mean_cell([seed[column] for seed in seeds])
                                     for column in columns)]
                           for start, seeds in scores.items()])
