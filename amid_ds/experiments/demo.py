"""`amid-ds demo`: the whole job on this machine, in a few minutes, without a network or a GPU.

Nothing in it is special to it: the corpus is the Python standard library's source on the user's own disk, and teacher,
distilled student and the student beside it are made by `train` under the `deepspeed` launcher on two ranks, with
recipes that are left behind to be edited.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from amid_ds.checkpoint.export import export
from amid_ds.data import load_tokenizer, train_sentencepiece
from amid_ds.distributed.launch import launch_command
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval import evaluate

RANKS = 2
VOCABULARY = 2048
SEQ_LENGTH = 256
HELD_OUT_ONE_IN = 20
HELD_OUT_BYTES = 80_000
CORPUS_BYTES = 4_000_000
TEACHER = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
STUDENT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
OBJECTIVE = {"alpha": -1.0, "lam": 0.1, "divergence": "kl", "order": "pr"}
TRAIN = {"seq_length": SEQ_LENGTH, "micro_batch_size": 4, "global_batch_size": 8, "warmup_steps": 10}
TEACHER_TRAIN = {**TRAIN, "steps": 200, "learning_rate": 2.0e-3}
STUDENT_TRAIN = {**TRAIN, "steps": 160, "learning_rate": 2.0e-3}


def demo(out: str, seed: int) -> None:
    """Run it all under `out`, which must be new or empty, and end with the table and `summary.json`."""
    began = time.monotonic()
    root = Path(out)
    if root.exists() and any(root.iterdir()):
        raise InputError(f"the folder {root} is there already and not empty", "a new or empty folder",
                         f"remove it, or run amid-ds demo --out {root}-2")
    root.mkdir(parents=True, exist_ok=True)
    _stage(1, "corpus: the Python standard library's source on this disk")
    train_file, held_out = make_corpus(root)
    _stage(2, "tokenizer: SentencePiece, trained on the corpus")
    with open(train_file, encoding="utf-8") as rows:
        train_sentencepiece((json.loads(row)["text"] for row in rows), root / "tokenizer", VOCABULARY)
    tokenizer = load_tokenizer(str(root / "tokenizer"))
    new_model(root / "init" / "teacher", TEACHER, tokenizer, seed)
    new_model(root / "init" / "student", STUDENT, tokenizer, seed + 1)
    _stage(3, "teacher: trained by this project's own `train`, with cross entropy alone")
    _train(root, "teacher", train_file, root / "init" / "teacher", None, TEACHER_TRAIN, seed)
    _stage(4, "student: distilled from the teacher with AMiD")
    _train(root, "distilled", train_file, root / "init" / "student", root / "models" / "teacher", STUDENT_TRAIN, seed)
    _stage(5, "beside it: the same student, data and steps with cross entropy alone")
    _train(root, "ce", train_file, root / "init" / "student", None, STUDENT_TRAIN, seed)
    _stage(6, "evaluation on files that nobody was trained on")
    scores = _evaluate(root, tokenizer, held_out)
    (root / "summary.json").write_text(
        json.dumps({name: dataclasses.asdict(score) for name, score in scores.items()}, indent=1) + "\n")
    evaluate.print_table(scores)
    _go_on(root, time.monotonic() - began)


def _stage(number: int, title: str) -> None:
    print(f"\n[{number}/6] {title}", flush=True)


def make_corpus(root: Path) -> tuple[Path, Path]:
    """(train, held-out) jsonl under `root`; a file's name alone decides its side, so every machine splits alike."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    room = {True: HELD_OUT_BYTES, False: CORPUS_BYTES}
    for path in _sources(stdlib):
        name = str(path.relative_to(stdlib))
        held_out = zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue      # not every machine lets every file be read
        if text.strip() and room[held_out] > 0:
            rows[held_out].append({"text": text, "file": name})
            room[held_out] -= len(text)
    if not rows[True] or not rows[False]:
        raise InputError(f"{stdlib} holds too few Python source files", "the standard library as source",
                         "run with a Python that has it; on Debian: apt-get install libpython3-stdlib")
    paths = root / "corpus" / "train.jsonl", root / "corpus" / "heldout.jsonl"
    paths[0].parent.mkdir()
    for path, side in zip(paths, (False, True), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[side]), encoding="utf-8")
        print(f"  {path}: {len(rows[side])} files, {sum(len(row['text']) for row in rows[side]) / 1e6:.2f} MB")
    return paths


def _sources(stdlib: Path) -> Iterator[Path]:
    """The library's own files in an order that does not follow the alphabet, so that a cut corpus is a fair sample."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "__pycache__"}
    found = [path for path in stdlib.rglob("*.py") if not skipped & set(path.relative_to(stdlib).parts)]
    return iter(sorted(found, key=lambda path: zlib.crc32(str(path.relative_to(stdlib)).encode("utf-8", "replace"))))


def new_model(folder: Path, size: dict[str, int], tokenizer: Any, seed: int) -> None:
    """A Llama of this size with random weights, and the tokenizer, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=SEQ_LENGTH * 4,
                         tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"  {folder}: {model.num_parameters() / 1e6:.2f} M parameters, random")


def _train(root: Path, name: str, corpus: Path, student: Path, teacher: Path | None, train: dict[str, Any],
           seed: int) -> None:
    """Write the recipe, start it under the `deepspeed` launcher as a user would, export what comes out."""
    recipe: dict[str, Any] = {
        "student": {"model": str(student)},
        **({"teacher": {"model": str(teacher)}, "loss": OBJECTIVE} if teacher else {}),
        "data": {"train": [{"path": str(corpus), "text": "text"}], "prepared": str(root / "data"), "workers": 0},
        "train": {**train, "seed": seed},
        "deepspeed": "ds_configs/zero3_fp32.json",
        "checkpoint": {"every": 100},
        "output_dir": str(root / "runs" / name),
    }
    path = root / "recipes" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    line = launch_command(RANKS, "train", str(path))
    print("  " + " ".join(line), flush=True)
    status = subprocess.run(line, env={**os.environ, "DS_ACCELERATOR": "cpu"}).returncode   # one GPU is not two ranks'
    if status:
        raise TrainingError(f"the training of {name} ended with status {status}; its messages are above")
    shutil.rmtree(root / "models" / name, ignore_errors=True)
    export(root / "runs" / name, root / "models" / name)


def _evaluate(root: Path, tokenizer: Any, held_out: Path) -> dict[str, evaluate.Scores]:
    models = {name: evaluate.load_model(str(root / "models" / name)) for name in ("teacher", "distilled", "ce")}
    return {name: evaluate.evaluate(evaluate.EvalArgs(name, "teacher", str(held_out), SEQ_LENGTH), model,
                                    models["teacher"], tokenizer) for name, model in models.items()}


def _go_on(root: Path, seconds: float) -> None:
    here = Path(sys.executable).parent
    print(f"""
done in {seconds / 60:.1f} minutes; the numbers are in {root / 'summary.json'}. To go on:
  {here / 'tensorboard'} --logdir {root / 'runs'}
  {here / 'deepspeed'} --num_gpus {RANKS} --module amid_ds train {root}/recipes/distilled.yaml \\
      loss.lam=0.5 output_dir={root}/runs/mine
  {here / 'amid-ds'} export {root}/runs/mine {root}/models/mine
  {here / 'amid-ds'} eval {root}/models/mine --teacher {root}/models/teacher \\
      --data {root}/corpus/heldout.jsonl --seq-length {SEQ_LENGTH}""")
