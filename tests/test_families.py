"""The families of models that are tried, each against plain transformers, and the table of them.

Printed by `python tests/test_families.py [MODEL_TYPE ...]`, or by this file's slow test.
"""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from support.data import write_texts
from support.families import EVERY, FAMILIES, plain_model, save_tiny
from support.many_runs import Outcome, before, train_many
from support.reference_loop import reference_loop
from support.runs import (
    ROOT,
    comparable_metrics,
    read_metrics,
    write_gathering_config,
    write_recipe,
)

from amid_ds.distributed.devices import name_accelerator

COLUMNS = ("student", "teacher", "packed", "tensor parallel 2", "resume", "export")
# One of each kind that is not a row of like layers, for the default run.
QUICK = ("qwen3_5", "nemotron_h", "gemma3", "llama4", "deepseek_v32")
LOSSES = ("loss", "kd_loss", "ce_loss")
# A family's runs: of itself and another of it as its teacher, of documents that share rows, of rows
# that are one, and those on a tensor-parallel group; and of each with a Llama.
PACKED, PLAIN, SPLIT, AS_STUDENT, AS_TEACHER = "packed", "plain", "split", "student", "teacher"


class Trial:
    """The families' folders, recipes, runs and truths in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outcomes = folder, dict[tuple[str, str], Outcome]()
        self.texts = write_texts(folder / "texts.jsonl")
        self.config = write_gathering_config(folder)

    def model(self, name: str, seed: int) -> Path:
        """The folder of the family's model."""
        folder = self.folder / f"{name}-{seed}"
        return folder if folder.exists() else save_tiny(name, folder, seed=seed)

    def pair(self, name: str, run: str) -> tuple[Path, Path]:
        """The run's student and teacher."""
        return (self.model("llama" if run == AS_TEACHER else name, 0),
                self.model("llama" if run == AS_STUDENT else name, 1))

    def recipe(self, name: str, run: str, **changes) -> Path:
        """The recipe of a family's run of two steps."""
        path = self.folder / f"{name}-{run}.yaml"
        if path.exists():
            return path
        packed = run == PACKED
        return write_recipe(
            path, *self.pair(name, run), self.texts, self.folder / f"{name}-{run}",
            deepspeed=str(self.config), student__router_aux_loss=0.0,
            tensor_parallel=2 if run == SPLIT else 1, data__isolate_documents=packed,
            data__prepared=str(self.folder / ("documents" if packed else "rows")),
            **{"train__steps": 2, "train__weight_decay": 0.0, "train__eps": 1e-6,
               "checkpoint__every": 1, **changes})

    def train(self, runs: Sequence[tuple[str, str]], **changes) -> None:
        """Make these runs, (family, run) each, in one start of two ranks; again: resumed."""
        recipes = [self.recipe(*run, **changes) for run in runs]
        for run, outcome in zip(runs, train_many(recipes), strict=True):
            key = (run[0], f"{run[1]} resumed") if run in self.outcomes else run
            self.outcomes[key] = outcome
            if outcome.kind == "broken":
                print(f"=== {key}\n{outcome.log}", file=sys.stderr)

    @functools.cache   # noqa: B019
    def truth(self, name: str, run: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Each step's metrics and the trained weights, by plain transformers in one process."""
        recipe = yaml.safe_load(self.recipe(name, run).read_text())
        return reference_loop(*self.pair(name, run), recipe, Path(recipe["data"]["prepared"]))

    def verdict(self, name: str, run: str) -> str:
        """"yes" where the run's losses and gradients are the truth's, or what is wrong.

        To 1e-5; the norm of the gradients that follow a step of Adam's to 1e-3.
        """
        outcome = self.outcomes[name, run]
        if outcome.kind != "done":
            return described(outcome)
        folder = self.folder / f"{name}-{run}"
        lines = read_metrics(before(folder) if before(folder).exists() else folder)
        for line, expected in zip(lines, self.truth(name, run)[0], strict=True):
            for key in (*LOSSES, "grad_norm"):
                within = 1e-3 if key == "grad_norm" and line["step"] > 1 else 1e-5
                if line[key] != pytest.approx(expected[key], rel=within, abs=1e-7):
                    return (f"wrong: {key} of step {line['step']} is {line[key]:.6g}, "
                            f"by transformers {expected[key]:.6g}")
        return "yes"

    def resumed(self, name: str, run: str) -> str:
        """"yes" where the resumed run's metrics are the whole run's to the last digit."""
        outcome = self.outcomes[name, f"{run} resumed"]
        if outcome.kind != "done":
            return described(outcome)
        if "resumed after step 1" not in outcome.log:
            return "wrong: it began anew"
        folder = self.folder / f"{name}-{run}"
        same = comparable_metrics(folder) == comparable_metrics(before(folder))
        return "yes" if same else "wrong: other metrics"

    def exported(self, name: str, run: str) -> str:
        """"yes" where transformers opens RUN/model and its logits are the truth's."""
        model = before(self.folder / f"{name}-{run}") / "model"
        if not model.exists():
            return "–"
        ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
        opened, expected = plain_model(model), plain_model(self.model(name, 0))
        expected.load_state_dict(self.truth(name, run)[1], strict=False)
        with torch.no_grad():
            found, own = opened(input_ids=ids).logits, expected(input_ids=ids).logits
        distance = ((found - own).norm() / own.norm()).item()
        return "yes" if distance < 1e-4 else f"wrong: its logits are {distance:.1g} away"

    def split(self, name: str) -> str:
        """The verdict under tensor parallelism, and how much of the student stays whole."""
        verdict = self.verdict(name, SPLIT)
        whole = re.search(r"(\d+%) of the student's weights stay whole",
                          self.outcomes[name, SPLIT].log)
        return verdict if whole is None or verdict != "yes" else f"yes, {whole[1]} whole"


def described(outcome: Outcome) -> str:
    """What became of a run that was not done, in one line without the folder's name."""
    words = re.sub(r"\S*/(\S+)", r"\1", " ".join(outcome.words.split()))
    return f"{'refused' if outcome.kind == 'refused' else 'fails'}: {words[:300]}"


def try_families(names: Sequence[str], folder: Path) -> dict[str, dict[str, str]]:
    """Try each family in every column: {family: {column: what came of it}}."""
    trial = Trial(folder)
    trial.train([(name, PACKED) for name in names for _ in range(2)])
    trial.train([(name, SPLIT) for name in names])
    return {name: _try_family(trial, name) for name in names}


def _try_family(trial: Trial, name: str) -> dict[str, str]:
    """The family's cells, from its packed and its split runs; of what fails, from others."""
    def cell(of: Callable[..., str], *arguments: str) -> str:
        try:
            return of(name, *arguments)
        except Exception as error:
            return described(Outcome("broken", f"{type(error).__name__}: {error}"))

    packed = cell(trial.verdict, PACKED)
    student, teacher, whole = packed, packed, PACKED
    if packed != "yes":
        trial.train([(name, PLAIN)] * 2)
        student = teacher = cell(trial.verdict, PLAIN)
        whole = PLAIN
    if student != "yes":
        trial.train([(name, AS_STUDENT), (name, AS_TEACHER)])
        student, teacher = cell(trial.verdict, AS_STUDENT), cell(trial.verdict, AS_TEACHER)
    return dict(zip(COLUMNS, (student, teacher, packed, cell(trial.split),
                              cell(trial.resumed, whole), cell(trial.exported, whole)),
                    strict=True))


def markdown(table: dict[str, dict[str, str]]) -> str:
    """The table as the README has it: reasons as numbered lines below it."""
    reasons: list[str] = []
    lines = [f"| transformers {transformers.__version__} | {' | '.join(COLUMNS)} |",
             f"|---|{'---|' * len(COLUMNS)}"]
    for name, cells in table.items():
        row = []
        for cell in cells.values():
            word, _, reason = cell.partition(": ")
            if reason and reason not in reasons:
                reasons.append(reason)
            row.append(f"{word} ({reasons.index(reason) + 1})" if reason else word)
        lines.append(f"| {FAMILIES[name].title} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}"
                                    for number, reason in enumerate(reasons, 1))])


def test_families_of_each_kind_have_the_losses_of_plain_transformers(tmp_path):
    trial = Trial(tmp_path)
    trial.train([(name, PACKED) for name in QUICK], train__steps=1, train__warmup_steps=1)
    assert {name: trial.verdict(name, PACKED) for name in QUICK} == dict.fromkeys(QUICK, "yes")


def test_the_readmes_table_has_every_family():
    text = (ROOT / "amid_ds" / "models" / "README.md").read_text()
    rows = text.split("\n| transformers ")[1].split("\n\n")[0].splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == [
        family.title for family in EVERY.values()]


@pytest.mark.slow
def test_no_family_has_other_losses_than_plain_transformers_and_this_is_the_table(tmp_path):
    table = try_families(list(FAMILIES), tmp_path)
    print("\n" + markdown(table))
    assert not [(name, column, cell) for name, cells in table.items()
                for column, cell in cells.items() if cell.startswith(("wrong", "fails"))]


if __name__ == "__main__":
    name_accelerator()
    with tempfile.TemporaryDirectory() as folder:
        print(markdown(try_families(sys.argv[1:] or list(FAMILIES), Path(folder))))
