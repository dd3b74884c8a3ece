"""The best evaluation of a run: measured, saved, kept over resumes, exported, and the early end."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rouge_score import rouge_scorer
from support.data import write_instructions
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_results, read_metrics, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.checkpoint.best import describe_early_end, subject_of, updated_best
from amid_ds.checkpoint.manifest import Manifest, list_checkpoints
from amid_ds.checkpoint.state import BestState, TrainState
from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Best
from amid_ds.data import load_tokenizer, tokenizer_fingerprint
from amid_ds.errors import InputError
from amid_ds.experiments.sweep import final_metrics
from amid_ds.run.places import check_places
from amid_ds.training.selection import Selection

NEW, SAMPLED = 5, 5
GREEDY = {"max_new_tokens": NEW, "temperature": 0, "batch_size": 3, "rows": SAMPLED}
METRIC = "kl_to_teacher"
BEST = {"metric": f"eval.held.out.{METRIC}", "mode": "min", "patience": 3}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("held") / "rows.jsonl", rows=9, seed=5)


@pytest.fixture(scope="module")
def recipe_for(llama_pair, instructions_file, held_out, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, **changes): evaluates and samples at each step, saves some of them."""
    prepared = tmp_path_factory.mktemp("prepared") / "data"
    evaluated = {"path": str(held_out), "name": "held.out", "prompt": "prompt",
                 "response": "response", "generate": GREEDY}

    def write(run: Path, **changes) -> Path:
        settings = {"data__prepared": str(prepared), "data__eval": [evaluated],
                    "train__eval_every": 1, "train__steps": 12, "train__learning_rate": 0.05,
                    "train__warmup_steps": 0, "train__micro_batch_size": 2,
                    "checkpoint": {"every": 5, "best": BEST}, **changes}
        return write_recipe(run.with_suffix(".yaml"), *llama_pair, instructions_file, run,
                            **settings)
    return write


@pytest.fixture(scope="module")
def ended(recipe_for, tmp_path_factory) -> Path:
    """A run on two ranks that ends early: tests copy what they change."""
    run = tmp_path_factory.mktemp("ended") / "run"
    assert "ended early after step" in run_ranks(2, "train", recipe_for(run)).output()
    return run


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def saved_steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(model).state_dict()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours)


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


def test_a_run_ends_after_its_patience_and_keeps_the_best_beside_the_newest(ended, capsys):
    values = [line[METRIC] for line in evaluations(ended)]
    best = min(range(len(values)), key=values.__getitem__) + 1
    assert len(values) == len(read_metrics(ended)) == best + 3 < 12
    # Neither a step of `every` nor one of the two newest; those that were the best before are gone.
    assert best % 5 and saved_steps(ended) == [best, 5, best + 3]
    assert values[:best] != sorted(values[:best])
    state = Manifest.read(ended / "checkpoints" / f"step_{best + 3:08d}").state.best
    assert (state["value"], state["step"], state["since"]) == (values[best - 1], best, 3)
    capsys.readouterr()
    assert main(["status", str(ended)]) == 0
    said = capsys.readouterr().out
    assert f"done, ended early after step {best + 3}: 3 evaluations without a better" in said
    assert f"{METRIC} {values[best - 1]:.6g} at step {best}" in said and "time left" not in said
    assert main(["checkpoints", str(ended)]) == 0
    assert capsys.readouterr().out.count("the best") == 1
    # So a sweep compares what its runs have selected.
    assert final_metrics(ended) | {"best_step": best, f"best_{METRIC}": values[best - 1]} == (
        final_metrics(ended))


@pytest.mark.slow
def test_the_report_says_why_it_ended_and_what_was_the_best(ended, tmp_path):
    assert main(["report", str(ended), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"3 evaluations without a better {BEST['metric']}" in page
    assert f"{BEST['metric']} " in page and "<th>rouge l</th>" in page


def test_the_best_model_is_that_checkpoints_bit_by_bit_and_the_model_the_last_ones(
        ended, llama_pair, tmp_path):
    best, _, last = saved_steps(ended)
    for step, folder in ((best, "best"), (last, "model")):
        assert main(["export", str(ended / "checkpoints" / f"step_{step:08d}"),
                     str(tmp_path / folder)]) == 0
        assert equal(weights(ended / folder), weights(tmp_path / folder))
        assert (ended / folder / "README.md").read_text().count(f", step {step}\n") == 1
    assert not equal(weights(ended / "best"), weights(ended / "model"))
    assert (tokenizer_fingerprint(load_tokenizer(str(ended / "best")))
            == tokenizer_fingerprint(load_tokenizer(str(llama_pair[0]))))


def test_rouge_l_is_that_of_what_transformers_generates(ended, held_out):
    best = saved_steps(ended)[0]
    model = AutoModelForCausalLM.from_pretrained(ended / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(ended / "best")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for line in held_out.read_text().splitlines()[:SAMPLED]:
        row = json.loads(line)
        ids = tokenizer(row["prompt"])["input_ids"]
        answer = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False,
                                pad_token_id=0)[0, len(ids):]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        scores.append(scorer.score(row["response"], text)["rougeL"].fmeasure)
    assert evaluations(ended)[best - 1]["rouge_l"] == pytest.approx(sum(scores) / SAMPLED, rel=1e-6)
    assert sum(scores) > 0


def test_a_run_that_went_on_from_its_best_step_ends_as_the_uninterrupted_one(ended, recipe_for,
                                                                             tmp_path):
    run = copied(ended, tmp_path)
    best, *later = saved_steps(run)
    for step in later:
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    for folder in ("best", "model"):
        shutil.rmtree(run / folder)
    recipe = recipe_for(tmp_path / "copy")
    assert f"resumed after step {best}" in run_ranks(2, "train", recipe).output()
    assert comparable_results(run) == comparable_results(ended)
    assert saved_steps(run) == saved_steps(ended)
    assert equal(weights(run / "best"), weights(ended / "best"))
    assert equal(weights(run / "model"), weights(ended / "model"))


@pytest.mark.slow
def test_killed_after_each_of_its_saves_it_is_the_run_that_nobody_killed(ended, recipe_for,
                                                                         tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for(run)
    for _ in range(3):
        before = saved_steps(run)
        ranks = Ranks(2, "train", recipe)
        ranks.wait_until(lambda before=before: saved_steps(run) != before, interval=0.002)
        ranks.signal(signal.SIGKILL)
        ranks.wait()
    run_ranks(2, "train", recipe)
    assert comparable_results(run) == comparable_results(ended)
    assert saved_steps(run) == saved_steps(ended)
    assert equal(weights(run / "best"), weights(ended / "best"))


def test_a_run_that_ended_early_is_done_and_makes_what_is_missing_of_the_best_good_checkpoint(
        ended, recipe_for, tmp_path):
    run = copied(ended, tmp_path)
    best, *others = saved_steps(run)
    shutil.rmtree(run / "best")
    damaged = next((run / "checkpoints" / f"step_{best:08d}").glob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = run_ranks(1, "train", recipe_for(tmp_path / "copy")).output()
    assert "ended early after step" in said and "nothing to do" in said
    assert f"step_{best:08d} of the best eval.held.out.{METRIC} is damaged" in said
    assert comparable_results(run) == comparable_results(ended)
    value = {line["step"]: line[METRIC] for line in evaluations(run)}
    second = min(others, key=value.__getitem__)
    assert f", step {second}\n" in (run / "best" / "README.md").read_text()


# Two runs of some steps each.
@pytest.mark.slow
@pytest.mark.parametrize("ranks, layout", [(1, []), (2, ["tensor_parallel=2"])])
def test_in_any_layout_it_is_the_same_best_and_the_same_samples(ranks, layout, ended, recipe_for,
                                                                tmp_path):
    recipe = recipe_for(tmp_path / "run")
    run_ranks(ranks, "train", recipe, *layout)
    for line, truth in zip(evaluations(tmp_path / "run"), evaluations(ended), strict=True):
        assert line.pop("name") == truth.pop("name")
        assert line == pytest.approx(truth, rel=1e-4)
    assert saved_steps(tmp_path / "run") == saved_steps(ended)
    # At a temperature, from the first weights on, where the layouts' last digits are still close.
    scores = []
    for number, (size, *keys) in enumerate([(ranks, *layout), (2,)]):
        run = tmp_path / f"warm{number}"
        run_ranks(size, "train", recipe, f"output_dir={run}", "train.steps=2", *keys,
                  "data.eval.0.generate={max_new_tokens: 12, top_p: 0.9, batch_size: 2}")
        scores.append([line["rouge_l"] for line in evaluations(run)])
    assert scores[0] == scores[1] and min(scores[0]) > 0


@pytest.mark.slow
def test_a_run_with_more_patience_or_another_metric_goes_on(ended, recipe_for, tmp_path):
    for number, change in enumerate([
            "checkpoint.best.patience=null",
            "checkpoint.best={metric: eval.held.out.loss, mode: min, patience: 9}"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = copied(ended, folder)
        said = run_ranks(1, "train", recipe_for(folder / "copy"), change).output()
        assert f"resumed after step {saved_steps(ended)[-1]}" in said
        assert ("begins anew" in said) == bool(number)
        assert len(read_metrics(run)) == 12
        assert Manifest.read(run / "checkpoints" / "step_00000012").state.best["step"] in (
            saved_steps(run))


@pytest.mark.slow
def test_a_best_evaluation_that_could_not_be_saved_is_none(ended, recipe_for, tmp_path):
    """The next one is compared with the one before it."""
    best = saved_steps(ended)[0]
    run = tmp_path / "run"
    ranks = Ranks(1, "train", recipe_for(run), variables={"FAILS": str(best)},
                  target=failing_rank)
    assert ranks.wait() == [0], ranks.output()
    assert f"SAVE FAILED after step {best}" in ranks.output()
    values = {line["step"]: line[METRIC] for line in evaluations(run) if line["step"] != best}
    second = min(values, key=values.__getitem__)
    assert f", step {second}\n" in (run / "best" / "README.md").read_text()
    assert second in saved_steps(run)


def failing_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank whose commit of the step FAILS fails."""
    from amid_ds.checkpoint.saver import Saver

    original = Saver._commit

    def commit(self, save, written):
        if save.state.step == int(variables["FAILS"]):
            return "no space left"
        return original(self, save, written)

    Saver._commit = commit
    rank_main(argv, variables, log)


@pytest.mark.slow
def test_a_request_to_stop_is_honoured_after_the_evaluation_that_it_comes_in(ended, recipe_for,
                                                                             tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for(run)
    ranks = Ranks(2, "train", recipe, target=stopped_rank)
    assert ranks.wait() == [75, 75], ranks.output()
    assert [line["step"] for line in evaluations(run)] == [1, 2, 3]
    run_ranks(2, "train", recipe)
    assert comparable_results(run) == comparable_results(ended)
    assert equal(weights(run / "best"), weights(ended / "best"))


def stopped_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank whose run is asked to stop within its third evaluation."""
    from amid_ds.training.sample_scores import SampleScores

    original, steps = SampleScores.add_to, []

    def add_to(self, metrics, before_pass):
        steps.append(len(steps) + 1)
        if steps[-1] == 3:
            (Path(argv[1]).with_suffix("") / "STOP").touch()
        original(self, metrics, before_pass)

    SampleScores.add_to = add_to
    rank_main(argv, variables, log)


@pytest.mark.slow
def test_adaptive_rollouts_and_the_best_share_an_evaluation_and_a_resume(recipe_for, tmp_path):
    rollout = {"adaptive": {"init_threshold": 0.7, "capacity": 9}, "max_new_tokens": 4}
    recipe = recipe_for(tmp_path / "run", rollout=rollout, train__steps=6,
                        checkpoint={"every": 3, "keep": 9, "best": {**BEST, "patience": None}})
    run_ranks(2, "train", recipe)
    whole, best = comparable_results(tmp_path / "run"), weights(tmp_path / "run" / "best")
    for step in saved_steps(tmp_path / "run"):
        if step > 3:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert "resumed after step 3" in run_ranks(2, "train", recipe).output()
    assert comparable_results(tmp_path / "run") == whole
    assert equal(weights(tmp_path / "run" / "best"), best)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_the_first_of_the_best_values_and_never_an_infinite_one(mode):
    draw = random.Random(3)
    best = Best(metric="eval.held.loss", mode=mode)
    sign = 1 if mode == "min" else -1
    for _ in range(50):
        values = [draw.choice([None, 1.0, 2.0, 3.0]) for _ in range(draw.randrange(1, 9))]
        state = BestState(of="", value=None, step=None, since=0)
        for step, value in enumerate(values, 1):
            state = updated_best(best, state, step, value)
        known = [(sign * value, step) for step, value in enumerate(values, 1) if value is not None]
        value, step = min(known, default=(None, 0))
        assert state == {"of": "", "value": None if value is None else sign * value,
                         "step": step or None, "since": len(values) - step}


def test_a_best_that_was_lost_is_taken_back_with_the_evaluations_since(recipe_for, tmp_path):
    recipe = load_recipe(recipe_for(tmp_path / "run"))
    state = TrainState()
    selection = Selection(recipe, state)
    for step, value in enumerate([3.0, 2.0, None, 1.0, 1.0], 1):
        selection.note(step, {"held.out": {METRIC: value}})
    assert (state.best["step"], state.best["since"]) == (4, 1)
    selection.lost(2)
    assert state.best["step"] == 4
    selection.lost(4)
    assert (state.best["value"], state.best["step"], state.best["since"]) == (2.0, 2, 3)
    # A later attempt by the same recipe goes on with it, one that compares something else does not.
    assert Selection(recipe, TrainState(best=state.best)).state.best == state.best
    for change, step in (("checkpoint.best.mode=max", None), ("data.eval.0.truncate=right", None),
                         ("data.eval.0.generate.seed=3", 2), ("checkpoint.best.patience=9", 2)):
        changed = load_recipe(recipe_for(tmp_path / "run"), [change])
        assert Selection(changed, TrainState(best=state.best)).state.best["step"] == step
    assert TrainState.from_json({"step": 3, "tokens": 9}).best is None


def test_a_run_whose_patience_ends_with_its_last_step_has_not_ended_early(recipe_for, tmp_path):
    recipe = load_recipe(recipe_for(tmp_path / "run"))
    best = BestState(of=subject_of(recipe, recipe.checkpoint.best), value=1.0, step=8, since=3)
    said = [describe_early_end(recipe, TrainState(step=step, best=best)) for step in (11, 12)]
    assert said[0].startswith("ended early after step 11: 3 evaluations") and said[1] is None


def test_of_samples_the_seed_is_another_subject_and_the_batch_is_not(recipe_for, tmp_path):
    path, metric = recipe_for(tmp_path / "run"), "checkpoint.best.metric=eval.held.out.rouge_l"
    plain, batch, seed = (subject_of(recipe, recipe.checkpoint.best) for recipe in (
        load_recipe(path, [metric, *more]) for more in (
            (), ("data.eval.0.generate.batch_size=7",), ("data.eval.0.generate.seed=3",))))
    assert plain == batch != seed


def test_a_folder_of_somebody_elses_in_the_best_ones_place_is_refused(recipe_for, tmp_path):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "best" / "mine.txt").write_text("mine")
    (run / "provenance.json").write_text('{"tokenizer_sha256": ""}')
    recipe = recipe_for(run)
    with pytest.raises(InputError, match=r"best, is there already .* it holds mine\.txt"):
        check_places(load_recipe(recipe))
    check_places(load_recipe(recipe, ["checkpoint.best=null"]))


ERRORS = {
    "checkpoint.best.metric=eval.other.loss": "no set called 'other'.*held.out",
    "checkpoint.best.metric=eval.held.out.accuracy": "no such key of an evaluation: 'accuracy'",
    "checkpoint.best.metric=loss": "a metric is eval.NAME.KEY",
    "checkpoint.best.mode=least": "checkpoint.best.mode.*'min' or 'max'",
    "checkpoint.best.patience=0": "checkpoint.best.patience",
    "checkpoint.best={\"metric\":\"eval.held.out.loss\"}": "`checkpoint.best.mode` is missing",
    "teacher=null": "no `teacher` that could be asked, so no kl_to_teacher",
    "data.eval.0.generate=null checkpoint.best.metric=eval.held.out.rouge_l":
        "has no `generate`",
    "train.eval_every=0": "only the last step is evaluated",
    "train.eval_every=0 checkpoint.best.metric=eval.x.loss": "called 'x'.*`train.eval_every` is 0",
    "data.eval.0.prompt=null data.eval.0.response=null": "its rows have no prompt",
    "data.eval.0.generate.max_new_tokens=24": "leaves a prompt no room in `train.seq_length` 24",
    "data.eval.0.generate.top_p=0": "top_p",
}


@pytest.mark.parametrize("overrides", ERRORS)
def test_what_cannot_be_measured_is_refused_before_anything_is_read(overrides, recipe_for,
                                                                    tmp_path):
    with pytest.raises(InputError, match=ERRORS[overrides]):
        load_recipe(recipe_for(tmp_path / "run"), overrides.split(" "))
