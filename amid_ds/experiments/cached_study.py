"""`amid-ds study cached`: what a student learns from a cache, by what the cache keeps.

The teacher and the start are those of `amid-ds study`, and so are the students' size and steps;
they read a part of its corpus, so that the caches are small. Each student learns by forward KL or
by AMiD from the teacher itself, from its most probable ids, with the rest in one class (`ghost`) or
left out (`drop`), or from draws. The paper of sampled targets (arXiv 2503.16870) says that top-k
alone is biased, and that draws are not: here is how far each student is from its teacher at the
end, what a position takes in the cache, and how long a step is.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from amid_ds.config.grid import path_override
from amid_ds.config.parse import load_recipe
from amid_ds.data import TargetFolder, load_tokenizer
from amid_ds.distributed.launch import launch_command
from amid_ds.errors import TrainingError
from amid_ds.eval import evaluate
from amid_ds.eval.protocol import EvalArgs, EvalProtocol
from amid_ds.experiments import study
from amid_ds.experiments.sweep import SCORES_FILE, markdown_table, run_logged, run_one
from amid_ds.files.atomic import replace_text
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics

logger = logging.getLogger(__name__)

# Of the corpus, from its first file on: about what the students read once.
CACHED_CHARACTERS = 450_000
FORWARD_KL, AMID = "{preset: fkl}", "{alpha: -3, lam: 0.1, order: pr}"
TOPK, SAMPLED = (8, 32, 128), (12, 50)


class CachedStudent(NamedTuple):
    """A line of the table: the objective, and the cache's options and `rest`; None: the teacher."""

    loss: str
    kept: tuple[str, int] | None = None
    rest: str | None = None

    @property
    def name(self) -> str:
        """Of its runs' folders, before the seed."""
        objective = "fkl" if self.loss == FORWARD_KL else "amid"
        kept = "live" if self.kept is None else f"{self.kept[0]}{self.kept[1]}"
        return "-".join(filter(None, [objective, kept, self.rest]))

    @property
    def title(self) -> str:
        """For the table."""
        if self.kept is None:
            return "the teacher itself"
        method, entries = self.kept
        if method == "sample":
            return f"N = {entries} draws"
        return f"K = {entries}, {'the rest as one class' if self.rest == 'ghost' else 'no rest'}"


STUDENTS = (
    CachedStudent(FORWARD_KL),
    *(CachedStudent(FORWARD_KL, ("topk", k), rest) for rest in ("drop", "ghost") for k in TOPK),
    *(CachedStudent(FORWARD_KL, ("sample", draws)) for draws in SAMPLED),
    CachedStudent(AMID),
    *(CachedStudent(AMID, ("topk", k), "ghost") for k in TOPK))
# By student, the scores of each seed.
CachedScores = Mapping[CachedStudent, list[dict[str, float]]]


def cached_study(out: str, seeds: int) -> None:
    """Run everything under `out`, which `amid-ds study` may share; end with cached.md there."""
    root = study.open_study(out, seeds)
    _, recipe = study.make_study_models(root)
    corpus = _part_of_corpus(root)
    overrides = [*study.study_overrides(root), path_override("data.train.0.path", corpus),
                 path_override("data.prepared", root / "cached" / "data")]
    for kept in dict.fromkeys(each.kept for each in STUDENTS if each.kept is not None):
        _write_cache(root, recipe, overrides, kept)
    teacher = evaluate.load_model(str(study.study_model_run(root, "teacher").model))
    scores: dict[CachedStudent, list[dict[str, float]]] = {}
    for number, student in enumerate(STUDENTS, 1):
        for seed in range(seeds):
            run = _train(root, recipe, overrides, student, seed,
                         f"[{number}/{len(STUDENTS)}] {student.name} {seed}")
            scores.setdefault(student, []).append(_score(root, run, teacher))
        replace_text(root / "cached.md", cached_table(root, scores))
    print(f"\n{cached_table(root, scores)}\nthe table is {root / 'cached.md'}", flush=True)


def _part_of_corpus(root: Path) -> Path:
    """The corpus' first files, of about CACHED_CHARACTERS together, made once."""
    path = root / "cached" / "train.jsonl"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        texts, room = [], CACHED_CHARACTERS
        for text in study.read_texts(root / "corpus" / "train.jsonl"):
            texts.append(text)
            room -= len(text)
            if room <= 0:
                break
        replace_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _cache_folder(root: Path, kept: tuple[str, int]) -> Path:
    return root / "cached" / f"{kept[0]}{kept[1]}"


def _write_cache(root: Path, recipe: str, overrides: list[str], kept: tuple[str, int]) -> None:
    """Run `amid-ds cache`, which does nothing in a folder that is complete."""
    folder = _cache_folder(root, kept)
    logger.info("cache: %s", folder)
    command = launch_command(1, "cache", recipe, *overrides, "--out", str(folder), f"--{kept[0]}",
                             str(kept[1]))
    if run_logged(command, root / "cached" / f"{folder.name}.log"):
        raise TrainingError(f"the cache {folder} could not be written")


def _train(root: Path, recipe: str, overrides: list[str], student: CachedStudent, seed: int,
           title: str) -> RunFolder:
    """Train a student by a run of its own, unless it is there."""
    run = RunFolder(root / "cached" / "students" / f"{student.name}-{seed}")
    own = [f"loss={student.loss}", f"train.seed={seed}", f"train.steps={study.STEPS}",
           path_override("output_dir", run.path)]
    if student.kept is not None:
        rest = "" if student.rest is None else f", rest: {student.rest}"
        folder = json.dumps(str(_cache_folder(root, student.kept)))
        own.append(f"teacher={{cached: {folder}{rest}}}")
    if run_one(title, recipe, [*overrides, *own], 1):
        raise TrainingError(f"the run {run.path} failed")
    return run


def _score(root: Path, run: RunFolder, teacher: nn.Module) -> dict[str, float]:
    """KL to the teacher and perplexity on held-out text, and seconds per step; made once."""
    path = run.path / SCORES_FILE
    if not path.exists():
        length = load_recipe(run.recipe).train.seq_length
        scores = evaluate.evaluate(
            EvalArgs(str(run.path), None, str(root / "corpus" / "heldout.jsonl"),
                     EvalProtocol(seq_length=length)),
            evaluate.load_model(str(run.model)), teacher, load_tokenizer(str(root / "tokenizer")))
        seconds = statistics.median(line["time/step"] for line in read_metrics(run.path)
                                    if line.get("time/step") is not None)
        replace_text(path, json.dumps({
            "kl_to_teacher": scores.kl_to_teacher, "perplexity": scores.perplexity,
            "seconds": seconds}) + "\n")
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def cached_table(root: Path, scores: CachedScores) -> str:
    """A line for each student: means over the seeds, with standard errors of several."""
    lines = []
    for student, seeds in scores.items():
        size = ""
        if student.kept is not None:
            cache = TargetFolder.open(_cache_folder(root, student.kept))
            size = f"{cache.bytes / cache.manifest.positions:.0f}"
        lines.append(["forward KL" if student.loss == FORWARD_KL else "AMiD α=-3", student.title,
                      *(study.mean_cell([seed[key] for seed in seeds])
                        for key in ("kl_to_teacher", "perplexity")), size,
                      f"{statistics.median(seed['seconds'] for seed in seeds):.3f}"])
    return markdown_table(["objective", "from", "KL(t‖s)", "perplexity", "bytes a position",
                           "s a step"], lines)
