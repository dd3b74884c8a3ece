"""`amid-ds study`: does the method do what the paper says? On a scale that a CPU can do, in one command.

One teacher, students of one size from one start, each objective with several seeds, all of them ordinary runs of the
packaged recipe `study`, so the study goes on where it was cut. What is held against the paper: the divergence from the
teacher in both directions (who covers the teacher's modes, and who seeks them), agreement, what samples are worth
beside how much they differ, and how steady the gradients are. The price of the scale is that nothing here says how
large an effect is for a large model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amid_ds.config.library import find_recipe
from amid_ds.config.parse import load_recipe
from amid_ds.data import load_tokenizer, train_sentencepiece
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval import evaluate
from amid_ds.eval.text_metrics import GenerationScores, require_rouge
from amid_ds.experiments import demo, plots
from amid_ds.experiments.sweep import (
    SCORES,
    Sweep,
    markdown,
    plan_sweep,
    read_sweep_rows,
    run_here,
    run_one,
    write_table,
)
from amid_ds.files import replace_text
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics

VOCABULARY = 1024
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
STUDENT = {"hidden_size": 80, "intermediate_size": 216, "num_hidden_layers": 2, "num_attention_heads": 4}
TEACHER_STEPS, START_STEPS, STEPS = 900, 200, 150
PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 64, 160, 48
OBJECTIVES = {
    "cross entropy": "{kd_weight: 0.0, ce_weight: 1.0}",
    "forward KL": "{preset: fkl}",
    "reverse KL": "{preset: rkl}",
    "skew KL": "{preset: skl, lam: 0.1}",
    **{f"AMiD α={alpha}": f"{{alpha: {alpha}, lam: 0.1, order: pr}}" for alpha in (-3, 0, 1, 3)},
}
COLUMNS = {      # of the table: heading -> what scores.json calls it
    "perplexity": "perplexity", "KL(t‖s)": "kl_to_teacher", "KL(s‖t)": "reverse_kl", "agreement": "top1_agreement",
    "teacher's NLL of samples": "teacher_nll", "distinct-4": "distinct_4", "self-BLEU": "self_bleu",
    "ROUGE-L": "rouge_l", "largest/median gradient": "gradient_peak"}


def study(out: str, seeds: int) -> None:
    """All of it under `out`; ends with the table and figure, also as study.md and study.png there."""
    if seeds < 1:
        raise InputError(f"--seeds {seeds}", "1 or more: every objective is trained once for each", "e.g. --seeds 3")
    require_rouge(), plots.require_matplotlib()      # or say now that one is missing
    root = Path(out)
    made = _make_inputs(root)
    recipe = str(find_recipe("study"))
    _train(root, recipe, "teacher", TEACHER_STEPS, "learning_rate=2.0e-3")
    _train(root, recipe, "start", START_STEPS, "learning_rate=2.0e-3")
    students = plan_sweep(recipe, [*_places(root), f"loss={','.join(OBJECTIVES.values())}",
                                   f"train.seed={','.join(map(str, range(seeds)))}", f"train.steps={STEPS}",
                                   f"output_dir={root / 'students'}"], 1)
    run_here(students, 1)
    scores = _score(root, students, made)
    text = summary(scores)
    replace_text(root / "study.md", text)
    draw(scores, root / "study.png")
    write_table(students.folder)
    plots.plot_losses(read_sweep_rows(students.folder), root / "losses.png")
    print(f"\n{text}\nthe study's table and figure are {root / 'study.md'} and study.png", flush=True)


def _make_inputs(root: Path) -> Path:
    """Corpus, tokenizer and untrained models, made once; the prompts of held-out files with how they go on."""
    prompts = root / "corpus" / "prompts.jsonl"
    if not prompts.exists():
        shutil.rmtree(root / "corpus", ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        train, held_out = demo.make_corpus(root)
        rows = [json.loads(row)["text"] for row in train.read_text(encoding="utf-8").splitlines()]
        train_sentencepiece(rows, root / "tokenizer", VOCABULARY)
        tokenizer = load_tokenizer(str(root / "tokenizer"))
        for name, size in (("teacher", TEACHER), ("start", STUDENT)):
            demo.new_model(root / "init" / name, size, tokenizer, seed=0)
        replace_text(prompts, "".join(map(_prompt, _pieces(held_out))))
    return prompts


def _pieces(held_out: Path) -> list[str]:
    texts = [json.loads(row)["text"] for row in held_out.read_text(encoding="utf-8").splitlines()]
    size = 2 * PROMPT_CHARACTERS
    pieces = [text[start:start + size] for text in texts for start in range(0, len(text) - size, size)]
    return pieces[::max(1, len(pieces) // PROMPTS)][:PROMPTS]


def _prompt(piece: str) -> str:
    return json.dumps({"prompt": piece[:PROMPT_CHARACTERS], "response": piece[PROMPT_CHARACTERS:]}) + "\n"


def _places(root: Path) -> list[str]:
    """The recipe's paths, under `root`."""
    return [f"student.model={RunFolder(root / 'runs' / 'start').model}", f"teacher.model={RunFolder(root / 'runs' / 'teacher').model}",
            f"data.train.0.path={root / 'corpus' / 'train.jsonl'}", f"data.prepared={root / 'data'}",
            "data.eval=[]"]      # all of them are scored at the end


def _train(root: Path, recipe: str, name: str, steps: int, *settings: str) -> None:
    """Teacher and start: cross entropy alone, from random weights."""
    overrides = [*_places(root), f"student.model={root / 'init' / name}", "teacher=null", f"train.steps={steps}",
                 *(f"train.{setting}" for setting in settings), f"output_dir={root / 'runs' / name}"]
    if run_one(name, recipe, overrides, 1):
        raise TrainingError(f"the training of the {name} failed")


ScoredStudent = Mapping[str, Sequence[Mapping[str, Any]]]      # by objective, the scores of each seed


def _score(root: Path, students: Sweep, prompts: Path) -> ScoredStudent:
    """Every student's scores, made once and kept beside it; the start's and the teacher's for comparison."""
    names = dict(zip(OBJECTIVES.values(), OBJECTIVES, strict=True))
    teacher = evaluate.load_model(str(RunFolder(root / "runs" / "teacher").model))
    found: dict[str, list[Mapping[str, Any]]] = {}
    runs = [("teacher", root / "runs" / "teacher"), ("start", root / "runs" / "start")]
    runs += [(names[run.settings[0].partition("=")[2]], students.folder / run.name) for run in students.runs]
    for number, (name, run) in enumerate(runs, 1):
        if not (run / SCORES).exists():
            print(f"[{number}/{len(runs)}] scores of {run}", flush=True)
            replace_text(run / SCORES, json.dumps(_scores(root, run, teacher, prompts)) + "\n")
        found.setdefault(name, []).append(json.loads((run / SCORES).read_text(encoding="utf-8")))
    return found


def _scores(root: Path, run: Path, teacher: Any, prompts: Path) -> dict[str, Any]:
    model, tokenizer = evaluate.load_model(str(RunFolder(run).model)), load_tokenizer(str(root / "tokenizer"))
    length = load_recipe(find_recipe("study")).train.seq_length
    held_out = str(root / "corpus" / "heldout.jsonl")
    near = evaluate.evaluate(evaluate.EvalArgs(str(run), None, held_out, length), model, teacher, tokenizer)
    written = evaluate.evaluate(evaluate.EvalArgs(str(run), None, str(prompts), length, new_tokens=NEW_TOKENS), model,
                                teacher, tokenizer)
    of_samples = {field.name: getattr(written, field.name) for field in dataclasses.fields(GenerationScores)}
    norms = [line["grad_norm"] for line in read_metrics(run)]
    return {**dataclasses.asdict(near), **of_samples, "gradient_peak": max(norms) / statistics.median(norms)}


def summary(scores: ScoredStudent) -> str:
    """A line for each objective: means over the seeds, with their standard error where there are several."""
    lines = [[name, *(_shown([seed[key] for seed in seeds]) for key in COLUMNS.values())]
             for name, seeds in scores.items()]
    return markdown(["", *COLUMNS], lines)


def _shown(values: Sequence[float]) -> str:
    mean, error = plots.mean_and_error(values)
    digits = max(0, -math.floor(math.log10(error))) if error else 3      # to the first in doubt
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def draw(scores: ScoredStudent, path: Path) -> None:
    """Both divergences against each other; what samples are worth against how much they differ; divergences by α."""
    figure = plots.require_matplotlib()(figsize=(13, 4), layout="constrained")
    near, worth, path_of_alpha = figure.subplots(1, 3)
    for name, seeds in scores.items():
        if name in ("teacher", "start"):
            continue
        for panel, across, up in ((near, "kl_to_teacher", "reverse_kl"), (worth, "distinct_4", "teacher_nll")):
            (x, x_error), (y, y_error) = (plots.mean_and_error([seed[key] for seed in seeds]) for key in (across, up))
            panel.errorbar(x, y, xerr=x_error, yerr=y_error, marker="o", capsize=2, linestyle="", label=name)
    near.set(xlabel="KL(teacher‖student): covering", ylabel="KL(student‖teacher): seeking", title="held-out text")
    worth.set(xlabel="distinct 4-grams: diversity", ylabel="teacher's NLL: low is good", title="samples")
    near.legend(fontsize="x-small")
    alphas = {-1.0: scores["skew KL"], **{float(name.partition("=")[2]): seeds for name, seeds in scores.items()
                                          if "=" in name}}
    for key, label in (("kl_to_teacher", "KL(t‖s)"), ("reverse_kl", "KL(s‖t)")):
        points = {alpha: plots.mean_and_error([seed[key] for seed in alphas[alpha]]) for alpha in sorted(alphas)}
        means, errors = zip(*points.values(), strict=True)
        path_of_alpha.errorbar(list(points), means, errors, marker="o", capsize=2, label=label)
    path_of_alpha.set(xlabel="α (λ 0.1, order pr)", title="held-out text")
    path_of_alpha.legend(fontsize="small")
    figure.savefig(path, dpi=90)
