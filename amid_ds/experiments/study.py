"""`amid-ds study`: the paper's claims about α, tested at a scale that a CPU can do.

One teacher, and students of one size from one start: each objective with several seeds, all of
them ordinary runs of the packaged recipe `study`, so an interrupted study resumes. Compared with
the paper: the divergence from the teacher in both directions (a student that covers the teacher's
modes, or one that seeks them), agreement, quality against diversity of samples, and the steadiness
of gradients. Nothing here says how large an effect is for a large model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from amid_ds.config.grid import path_override
from amid_ds.config.library import find_recipe
from amid_ds.config.parse import load_recipe
from amid_ds.data import load_tokenizer, train_sentencepiece
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval import evaluate
from amid_ds.eval.protocol import EvalArgs, EvalProtocol
from amid_ds.eval.text_metrics import GenerationScores, require_rouge
from amid_ds.experiments import demo, plots
from amid_ds.experiments.small_models import LlamaSize, save_new_llama
from amid_ds.experiments.sweep import (
    SCORES_FILE,
    Sweep,
    markdown_table,
    plan_sweep,
    read_sweep_rows,
    run_here,
    run_one,
    write_table,
)
from amid_ds.files.atomic import replace_text
from amid_ds.files.json_lines import read_jsonl
from amid_ds.files.ownership import is_signed, require_own_folder, sign
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics

logger = logging.getLogger(__name__)

STUDY_VOCABULARY = 1024
# More than the demo, whose evaluations are to be short.
STUDY_HELD_OUT_CHARACTERS = 80_000
STUDY_TEACHER = LlamaSize(192, 512, 4, 4)
STUDY_STUDENT = LlamaSize(80, 216, 2, 4)
TEACHER_STEPS, START_STEPS, STEPS = 900, 200, 150
# Of the teacher and of the students' common start.
LEARNING_RATE = 2.0e-3
PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 64, 160, 48
OBJECTIVES = {
    "cross entropy": "{kd_weight: 0.0, ce_weight: 1.0}",
    "forward KL": "{preset: fkl}",
    "reverse KL": "{preset: rkl}",
    "skew KL": "{preset: skl, lam: 0.1}",
    **{f"AMiD α={alpha}": f"{{alpha: {alpha}, lam: 0.1, order: pr}}" for alpha in (-3, 0, 1, 3)},
}
# An objective of OBJECTIVES that is AMiD with this α.
SKEW_KL_ALPHA = -1.0
# The table's columns: heading -> name in scores.json.
STUDY_COLUMNS = {
    "perplexity": "perplexity", "KL(t‖s)": "kl_to_teacher", "KL(s‖t)": "reverse_kl",
    "agreement": "top1_agreement", "teacher's NLL of samples": "teacher_nll",
    "distinct-4": "distinct_4", "self-BLEU": "self_bleu", "ROUGE-L": "rouge_l",
    "largest/median gradient": "gradient_peak"}
# Scores by name, as in scores.json; a table's and figure's are never None.
SeedScores = Mapping[str, float]
# By objective, the scores of each seed.
StudyScores = Mapping[str, Sequence[SeedScores]]


def study(out: str, seeds: int) -> None:
    """Run everything under `out`; end with the table and figure, study.md and study.png there."""
    # If one is missing, say so now and not after the runs.
    require_rouge()
    plots.require_matplotlib()
    root = open_study(out, seeds)
    prompts, recipe = make_study_models(root)
    students = plan_sweep(recipe, [*study_overrides(root),
                                   f"loss={','.join(OBJECTIVES.values())}",
                                   f"train.seed={','.join(map(str, range(seeds)))}",
                                   f"train.steps={STEPS}",
                                   path_override("output_dir", root / "students")], 1)
    run_here(students, 1)
    scores = _score_all(root, students, prompts)
    table = study_table(scores)
    replace_text(root / "study.md", table)
    plot_study(scores, root / "study.png")
    rows = read_sweep_rows(students.folder)
    write_table(students.folder, rows)
    plots.plot_losses(rows, root / "losses.png")
    print(f"\n{table}\nthe study's table and figure are {root / 'study.md'} and study.png",
          flush=True)


def open_study(out: str, seeds: int, name: str = "study") -> Path:
    """The folder of a study, signed with its name. Raises InputError where it is not ours, or there
    is no seed."""
    if seeds < 1:
        raise InputError(f"--seeds {seeds}", "1 or more: every student is trained once for each",
                         "e.g. --seeds 3")
    root = Path(out)
    require_own_folder(root, is_signed(root, name), "--out")
    sign(root, name)
    return root


def make_study_models(root: Path) -> tuple[Path, str]:
    """(path of the prompts, path of the recipe); all that the students begin with is made, once."""
    prompts, recipe = _make_inputs(root), str(find_recipe("study"))
    _train(root, recipe, "teacher", TEACHER_STEPS)
    _train(root, recipe, "start", START_STEPS)
    return prompts, recipe


def _make_inputs(root: Path) -> Path:
    """Make corpus, tokenizer and untrained models once; the path of the prompts.

    Prompts are pieces of held-out files, each with its continuation as the response.
    """
    prompts = root / "corpus" / "prompts.jsonl"
    if prompts.exists():
        return prompts
    # What a killed start has left.
    for name in ("corpus", "tokenizer", "init"):
        shutil.rmtree(root / name, ignore_errors=True)
    train, held_out = demo.make_corpus(root, STUDY_HELD_OUT_CHARACTERS)
    train_sentencepiece(read_texts(train), root / "tokenizer", STUDY_VOCABULARY)
    tokenizer = load_tokenizer(str(root / "tokenizer"))
    for name, size in (("teacher", STUDY_TEACHER), ("start", STUDY_STUDENT)):
        save_new_llama(root / "init" / name, size, tokenizer, seed=0)
    replace_text(prompts, "".join(map(_prompt_line, _prompt_pieces(held_out))))
    return prompts


def read_texts(path: Path) -> list[str]:
    return [row["text"] for row in read_jsonl(path, "text")]


def _prompt_pieces(held_out: Path) -> list[str]:
    """PROMPTS pieces of the held-out texts, evenly spread, each of prompt and response."""
    size = 2 * PROMPT_CHARACTERS
    pieces = [text[start:start + size] for text in read_texts(held_out)
              for start in range(0, len(text) - size, size)]
    return pieces[::max(1, len(pieces) // PROMPTS)][:PROMPTS]


def _prompt_line(piece: str) -> str:
    row = {"prompt": piece[:PROMPT_CHARACTERS], "response": piece[PROMPT_CHARACTERS:]}
    return json.dumps(row) + "\n"


def study_model_run(root: Path, name: str) -> RunFolder:
    """The run of the teacher or of the start."""
    return RunFolder(root / "runs" / name)


def study_overrides(root: Path) -> list[str]:
    """The recipe's paths, under `root`. Nothing is evaluated during training, all at the end."""
    return [path_override("student.model", study_model_run(root, "start").model),
            path_override("teacher.model", study_model_run(root, "teacher").model),
            path_override("data.train.0.path", root / "corpus" / "train.jsonl"),
            path_override("data.prepared", root / "data"),
            "data.eval=[]"]


def _train(root: Path, recipe: str, name: str, steps: int) -> None:
    """Train the teacher or the start: cross entropy alone, from random weights."""
    overrides = [*study_overrides(root), path_override("student.model", root / "init" / name),
                 "teacher=null", f"train.steps={steps}", f"train.learning_rate={LEARNING_RATE}",
                 path_override("output_dir", study_model_run(root, name).path)]
    if run_one(name, recipe, overrides, 1):
        raise TrainingError(f"the training of the {name} failed")


def _score_all(root: Path, students: Sweep, prompts: Path) -> StudyScores:
    """Every run's scores, made once and kept in its folder; the teacher's and start's first."""
    names = {loss: name for name, loss in OBJECTIVES.items()}
    teacher = evaluate.load_model(str(study_model_run(root, "teacher").model))
    runs = [(name, study_model_run(root, name).path) for name in ("teacher", "start")]
    for student in students.runs:
        loss = student.settings[0].partition("=")[2]
        runs.append((names[loss], students.folder / student.name))
    scores: dict[str, list[SeedScores]] = {}
    for number, (name, run) in enumerate(runs, 1):
        path = run / SCORES_FILE
        if not path.exists():
            logger.info(f"[{number}/{len(runs)}] scores of {run}")
            replace_text(path, json.dumps(_score_run(root, run, teacher, prompts)) + "\n")
        scores.setdefault(name, []).append(json.loads(path.read_text(encoding="utf-8")))
    return scores


def _score_run(root: Path, run: Path, teacher: nn.Module, prompts: Path) -> dict[str, float | None]:
    """Scores on held-out text, those of samples for `prompts`, and `gradient_peak`."""
    model = evaluate.load_model(str(RunFolder(run).model))
    tokenizer = load_tokenizer(str(root / "tokenizer"))
    length = load_recipe(find_recipe("study")).train.seq_length
    text_args = EvalArgs(str(run), None, str(root / "corpus" / "heldout.jsonl"),
                         EvalProtocol(seq_length=length))
    prompt_args = EvalArgs(str(run), None, str(prompts),
                           EvalProtocol(seq_length=length, new_tokens=NEW_TOKENS))
    on_text = evaluate.evaluate(text_args, model, teacher, tokenizer)
    on_prompts = evaluate.evaluate(prompt_args, model, teacher, tokenizer)
    sample_scores = {field.name: getattr(on_prompts, field.name)
                     for field in dataclasses.fields(GenerationScores)}
    norms = [line["grad_norm"] for line in read_metrics(run)]
    return {**on_text.report(), **sample_scores,
            "gradient_peak": max(norms) / statistics.median(norms)}


def study_table(scores: StudyScores) -> str:
    """A line for each objective: means over the seeds, with standard errors of several."""
    lines = [[name, *(mean_cell([seed[key] for seed in seeds]) for key in STUDY_COLUMNS.values())]
             for name, seeds in scores.items()]
    return markdown_table(["", *STUDY_COLUMNS], lines)


def mean_cell(values: Sequence[float]) -> str:
    """The mean, and the standard error of several values, to the error's first digit."""
    mean, error = plots.mean_and_error(values)
    digits = max(0, -math.floor(math.log10(error))) if error else 3
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def plot_study(scores: StudyScores, path: Path) -> None:
    """Save three panels: both divergences, samples' quality against diversity, divergence by α."""
    figure = plots.require_matplotlib()(figsize=(13, 4), layout="constrained")
    divergences, samples, by_alpha = figure.subplots(1, 3)
    students = {name: seeds for name, seeds in scores.items() if name not in ("teacher", "start")}
    for name, seeds in students.items():
        _draw_point(divergences, name, seeds, "kl_to_teacher", "reverse_kl")
        _draw_point(samples, name, seeds, "distinct_4", "teacher_nll")
    divergences.set(xlabel="KL(teacher‖student): covering", ylabel="KL(student‖teacher): seeking",
                    title="held-out text")
    divergences.legend(fontsize="x-small")
    samples.set(xlabel="distinct 4-grams: diversity", ylabel="teacher's NLL: low is good",
                title="samples")
    _draw_by_alpha(by_alpha, scores)
    figure.savefig(path, dpi=90)


def _draw_point(panel: Any, name: str, seeds: Sequence[SeedScores], x_key: str, y_key: str) -> None:
    x, x_error = plots.mean_and_error([seed[x_key] for seed in seeds])
    y, y_error = plots.mean_and_error([seed[y_key] for seed in seeds])
    panel.errorbar(x, y, xerr=x_error, yerr=y_error, marker="o", capsize=2, linestyle="",
                   label=name)


def _draw_by_alpha(panel: Any, scores: StudyScores) -> None:
    by_alpha = {float(name.partition("=")[2]): seeds for name, seeds in scores.items()
                if "=" in name}
    by_alpha[SKEW_KL_ALPHA] = scores["skew KL"]
    for key, label in (("kl_to_teacher", "KL(t‖s)"), ("reverse_kl", "KL(s‖t)")):
        points = {alpha: plots.mean_and_error([seed[key] for seed in by_alpha[alpha]])
                  for alpha in sorted(by_alpha)}
        means, errors = zip(*points.values(), strict=True)
        panel.errorbar(list(points), means, errors, marker="o", capsize=2, label=label)
    panel.set(xlabel="α (λ 0.1, order pr)", title="held-out text")
    panel.legend(fontsize="small")
