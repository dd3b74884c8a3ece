"""The recipe's losses: values per token, schedules in them, losses of sources and rollouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml

from amid_ds import AMiD, PerToken, preset
from amid_ds.config.loss_section import overridden
from amid_ds.config.parse import dump_recipe, load_recipe, parse_recipe
from amid_ds.config.recipe import Loss, OwnLoss, Recipe, Statistic
from amid_ds.config.schedule import turning_points
from amid_ds.config.scheduled_values import Measure
from amid_ds.errors import InputError
from amid_ds.losses.measures import MEASURES, STATISTICS
from amid_ds.training.compatibility import refuse_other_run
from amid_ds.training.objective import (
    check_objectives,
    objective_at,
    objectives_at,
    scheduled_at,
)

TOTAL = 11
ENTROPY = {"by": "teacher_entropy", "linear": [0.1, 0.5], "at": [0.0, 4.0]}
ROWS = {"path": "x", "prompt": "p", "response": "r"}


def recipe_of(**changes) -> dict:
    """A recipe of TOTAL steps and two sources; `changes` are whole sections, or sources' losses."""
    sources = [{**ROWS}, {**ROWS, "path": "y"}]
    for number, loss in changes.pop("own", {}).items():
        sources[number]["loss"] = loss
    return {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": sources},
            "train": {"steps": TOTAL, "global_batch_size": 1}, "output_dir": "out", **changes}


def load(folder: Path, **changes) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_of(**changes)))
    return load_recipe(path)


@pytest.mark.parametrize("loss, objective", [
    ({"lam": ENTROPY}, AMiD(lam=PerToken("teacher_entropy", (0.1, 0.5), (0.0, 4.0)))),
    ({"alpha": {"by": "overlap", "linear": [-5, 1], "over": "sequence"}},
     AMiD(alpha=PerToken("overlap", (-5, 1), over="sequence"))),
    ({"order": {"qr": 1, "pr": {"by": "teacher_entropy", "at": [0.8, 1.2]}}, "lam": 0.5},
     AMiD(lam=0.5, order={"qr": 1.0, "pr": PerToken("teacher_entropy", at=(0.8, 1.2))})),
    ({"token_weight": {"by": "divergence", "top": 0.5}},
     AMiD(token_weight=PerToken("divergence", top=0.5))),
    ({"temperature": {"student": 2, "teacher": 1}},
     AMiD(temperature={"student": 2.0, "teacher": 1.0})),
    ({"temperature": {"teacher": 3}}, AMiD(temperature={"student": 1.0, "teacher": 3.0})),
    ({"alpha": 1, "lam": 0.4, "power": 2.5}, AMiD(alpha=1.0, lam=0.4, power=2.5)),
    ({"divergence": {"alpha_beta": {"alpha": 0.2, "beta": 0.7}}},
     AMiD(divergence={"alpha_beta": {"alpha": 0.2, "beta": 0.7}})),
    ({"preset": "skl", "lam": ENTROPY, "temperature": {"student": 2},
      "token_weight": {"by": "overlap"}},
     AMiD(lam=PerToken("teacher_entropy", (0.1, 0.5), (0.0, 4.0)),
          temperature={"student": 2.0, "teacher": 1.0}, token_weight=PerToken("overlap"))),
    ({"preset": "gkd", "beta": 0.3, "temperature": {"teacher": 2}},
     preset("gkd", beta=0.3, temperature={"student": 1.0, "teacher": 2.0})),
    ({"preset": "csd", "first": "uniform"}, preset("csd", first="uniform")),
    ({"divergence": {"concrete_score": {"second": "teacher"}}},
     AMiD(divergence={"concrete_score": {"second": "teacher"}})),
    ({"preset": "taid", "t": {"by": "overlap"}},
     preset("taid", t=PerToken("overlap"))),
])
def test_a_loss_of_the_recipe_is_this_objective(loss, objective, tmp_path):
    recipe = load(tmp_path, loss=loss)
    assert objective_at(recipe.loss, 0, TOTAL).amid == objective
    assert parse_recipe(dump_recipe(recipe), "it") == recipe


def test_every_number_in_a_loss_may_be_scheduled_and_is_logged_by_its_key(tmp_path):
    def to(end: float) -> dict:
        return {"linear": [0.5, end]}

    recipe = load(tmp_path, loss={
        "lam": {"by": "overlap", "linear": [0.1, to(0.9)], "at": [to(0.2), {"value": 4}]},
        "order": {"pr": to(1.5), "rq": {"by": "divergence", "linear": [to(2.5), 1]}},
        "temperature": {"student": to(3.5), "teacher": 1}, "power": to(4.5),
        "divergence": {"alpha_beta": {"alpha": to(5.5), "beta": 0.7}},
        "token_weight": {"by": "overlap", "top": to(1)}})
    ends = {"lam.linear.1": 0.9, "lam.at.0": 0.2, "lam.at.1": 4, "order.pr": 1.5,
            "order.rq.linear.0": 2.5, "temperature.student": 3.5, "power": 4.5,
            "divergence.alpha_beta.alpha": 5.5, "token_weight.top": 1}
    assert scheduled_at(recipe, TOTAL - 1) == pytest.approx(ends)
    halfway = {**{name: (0.5 + end) / 2 for name, end in ends.items()}, "lam.at.1": 4}
    assert scheduled_at(recipe, 5) == pytest.approx(halfway)
    assert objective_at(recipe.loss, 5, TOTAL).amid == AMiD(
        alpha=-1.0, lam=PerToken("overlap", (0.1, halfway["lam.linear.1"]), (0.35, 4)),
        divergence={"alpha_beta": {"alpha": 3.0, "beta": 0.7}},
        order={"pr": 1.0, "rq": PerToken("divergence", (1.5, 1))},
        temperature={"student": 2.0, "teacher": 1.0}, power=2.5,
        token_weight=PerToken("overlap", top=0.75))
    assert parse_recipe(dump_recipe(recipe), "it") == recipe


@pytest.mark.parametrize("loss, message", [
    ({"lam": {"linear": [0.1, 0.5], "at": [0, 4]}}, "`loss.lam.by` is missing"),
    ({"lam": {**ENTROPY, "by": "entropy"}}, "`loss.lam.by`: found 'entropy'; Input should be 't"),
    ({"lam": {**ENTROPY, "linear": [0.1, 1.5]}}, "`loss.lam`; values from 0 to 1"),
    ({"lam": {**ENTROPY, "linear": [0.1, {"cosine": [0, -1]}]}}, "`loss.lam`; values from 0 to 1"),
    ({"lam": {**ENTROPY, "at": [4, 0]}}, "`loss.lam`; `at` goes from 4 to 0"),
    ({"lam": {**ENTROPY, "at": [0, {"linear": [1, 0]}]}}, "`loss.lam`; `at` goes from 0 to 0"),
    ({"lam": {**ENTROPY, "linear": [0.1]}}, "`loss.lam.linear.1` is missing"),
    ({"lam": {**ENTROPY, "top": 0.5}}, "`loss.lam.top` is unknown; known: by, linear, at, over"),
    ({"lam": {**ENTROPY, "over": "batch"}}, "`loss.lam.over`: found 'batch'"),
    ({"lam": {**ENTROPY, "linear": [0, {"adaptive": [0, 1]}]}}, "`lam.linear.1` is adaptive"),
    ({"order": {"pr": {"by": "overlap", "linear": [-1, 1]}}}, "`loss.order.pr`; values from 0"),
    ({"token_weight": 2.0}, "`loss.token_weight`: found 2.0"),
    ({"token_weight": {**ENTROPY, "top": 0.5}}, "`loss.token_weight`; `top` chooses tokens"),
    ({"token_weight": {"by": "overlap", "top": 0}}, "`loss.token_weight.top`: found 0; values abo"),
    ({"token_weight": {"by": "overlap", "linear": [0, -1]}}, "`loss.token_weight`; a weight is 0"),
    ({"temperature": {"student": 0}}, "`loss.temperature.student`: found 0; values above 0"),
    ({"temperature": {"student": 2, "pupil": 1}},
     "`loss.temperature.pupil` is unknown; known: student, teacher"),
    ({"temperature": {"student": 2}, "temperature_scaling": "squared"}, "two temperatures that d"),
    ({"power": 0}, "`loss.power`: found 0; values above 0"),
    ({"divergence": 3}, "`loss.divergence`: found 3; Input should be a valid string"),
    ({"divergence": {"alpha_beta": {"alpha": [1]}}}, "`loss.divergence.alpha_beta.alpha`: found"),
    ({"normalise": "batch"}, "`loss.normalise`: found 'batch'; Input should be 'tokens' or 'seq"),
])
def test_a_wrong_loss_is_refused_in_one_line_by_name(loss, message, tmp_path):
    with pytest.raises(InputError) as refused:
        load(tmp_path, loss=loss)
    assert "has 1 problem(s)" in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize("loss, message", [
    ({"divergence": {"alpha_beta": {"alpha": 0.2}}}, "beta"),
    ({"divergence": {"alpha_beta": {"alpha": 0.2, "gamma": 0.7}}}, "gamma"),
    ({"divergence": {"renyi": {"alpha": 0.2}}}, "renyi"),
    ({"divergence": {"alpha_beta": {"alpha": "half", "beta": 0.7}}}, "alpha='half'"),
    ({"divergence": {"kl": {}, "alpha_beta": {}}}, "one of"),
    ({"preset": "skl", "power": 2.0}, "power"),
    ({"order": {"pq": 1.0}}, "order"),
])
def test_what_no_objective_has_is_refused_by_the_check_of_the_job(loss, message, tmp_path):
    recipe = load(tmp_path, loss=loss)
    own = load(tmp_path, own={1: loss})
    for place, wrong in (("`loss`: ", recipe), ("`data.train.1.loss`: ", own)):
        of_epochs = wrong.model_copy(update={
            "train": wrong.train.model_copy(update={"steps": None, "epochs": 1.0})})
        for recipe in (wrong, of_epochs):
            with pytest.raises(InputError, match=f"(?s)^{place}.*{message}"):
                check_objectives(recipe)


def test_equal_temperatures_of_both_sides_are_squared_as_one():
    both = {"student": {"linear": [1, 3]}, "teacher": {"linear": [1, 3]}}
    loss = Loss.model_validate({"temperature": both, "temperature_scaling": "squared"})
    assert objective_at(loss, 5, TOTAL).kd_weight == pytest.approx(4)


def test_the_recipe_knows_the_measures_of_the_loss():
    assert get_args(Measure) == MEASURES and get_args(Statistic) == STATISTICS


# --- losses of sources and rollouts --------------------------------------------------------------

BASE = {"alpha": -5.0, "lam": 0.3, "ce_weight": 0.5, "temperature": 2.0, "normalise": "sequence",
        "token_weight": {"by": "overlap"}}


@pytest.mark.parametrize("own, whole", [
    ({}, BASE),
    ({"lam": 0.9, "order": "qr"}, {**BASE, "lam": 0.9, "order": "qr"}),
    ({"token_weight": None, "temperature": 1}, {**BASE, "token_weight": None, "temperature": 1}),
    ({"preset": "srkl", "lam": 0.8}, {"preset": "srkl", "lam": 0.8, **{
        key: BASE[key] for key in ("ce_weight", "temperature", "normalise", "token_weight")}}),
])
def test_named_keys_replace_the_losss_and_a_preset_all_of_its_divergence(own, whole):
    merged = overridden(Loss.model_validate(BASE), OwnLoss.model_validate(own))
    assert merged == Loss.model_validate(whole)


def test_over_a_preset_null_gives_plain_keys_back_and_others_are_the_presets():
    base = Loss.model_validate({"preset": "gkd", "beta": 0.3, "kd_weight": 2.0})
    plain, other = (overridden(base, OwnLoss.model_validate(own))
                    for own in ({"preset": None, "lam": 0.7}, {"beta": 0.6}))
    assert plain == Loss(preset=None, lam=0.7, kd_weight=2.0)
    assert objective_at(other, 0, TOTAL).amid == preset("gkd", beta=0.6)


def test_every_origin_has_its_objective_and_its_schedules_are_logged_by_their_place(tmp_path):
    recipe = load(tmp_path, loss={"lam": {"linear": [0, 1]}, "ce_weight": 0.5},
                  own={1: {"order": "qr", "kd_weight": {"linear": [1, 2]}}},
                  rollout={"share": 0.5, "loss": {"preset": "srkl", "lam": {"linear": [1, 0]}}})
    at = objectives_at(recipe, 5)
    assert (at.base.amid, at.base.ce_weight) == (AMiD(lam=0.5), 0.5)
    assert at.by_source[0] is at.base
    assert (at.by_source[1].amid, at.by_source[1].kd_weight) == (AMiD(lam=0.5, order="qr"), 1.5)
    assert (at.sampled.amid, at.sampled.ce_weight) == (preset("srkl", lam=0.5), 0.0)
    assert scheduled_at(recipe, 0) == {"lam": 0, "data.train.1.loss.kd_weight": 1,
                                       "rollout.loss.lam": 1}
    assert parse_recipe(dump_recipe(recipe), "it") == recipe
    text = yaml.safe_load(dump_recipe(recipe))
    assert text["rollout"]["loss"].keys() == {"preset", "lam"}
    assert text["data"]["train"][0]["loss"] is None


@pytest.mark.parametrize("own, parameters, weight", [
    (None, {}, 1.0), ({"baseline": "none", "kd_weight": 2.0}, {"baseline": "none"}, 2.0),
    ({"ce_weight": 0.5}, {}, 1.0)])
def test_the_sampled_estimator_takes_the_place_of_the_divergence(own, parameters, weight, tmp_path):
    recipe = load(tmp_path, loss={"preset": "gkd", "beta": 0.3, "ce_weight": 0.1},
                  rollout={"share": 0.5, "estimator": "sampled", **({"loss": own} if own else {})})
    at = objectives_at(recipe, 0)
    assert (at.base.amid, at.base.ce_weight) == (preset("gkd", beta=0.3), 0.1)
    assert at.sampled.amid == preset("sampled_rkl", **parameters)
    assert (at.sampled.kd_weight, at.sampled.ce_weight) == (weight, (own or {}).get("ce_weight", 0))
    assert parse_recipe(dump_recipe(recipe), "it") == recipe


def test_objectives_are_checked_where_a_schedule_of_any_loss_turns(tmp_path):
    pieces = {"pieces": [{"steps": [2, 4], "value": 0.5}, {"steps": [6, 8], "linear": [0.5, 1]}]}
    recipe = load(tmp_path, own={0: {"order": {"pr": 0.5, "qr": pieces}}},
                  rollout={"share": 0.5, "loss": {"alpha": {"linear": [0, 1], "steps": [1, 3]}}})
    assert turning_points(recipe.losses, TOTAL) == [0, 1, 2, 3, 4, 6, 8, 10]


@pytest.mark.parametrize("changes, message", [
    ({"own": {0: {"foo": 1}}}, "`data.train.0.loss.foo` is unknown; known: preset, alpha"),
    ({"own": {1: {"normalise": "tokens"}}}, "`data.train.1.loss`; `normalise` is of the whole"),
    ({"own": {0: {"lam": {"adaptive": [0, 1]}}}}, "`lam` is adaptive: only a value of `loss`"),
    ({"own": {0: {"kd_weight": 0}}}, "`data.train.0.loss` over `loss`: kd_weight and ce_weight a"),
    ({"own": {0: {"temperature": {"student": 2}}}, "loss": {"temperature_scaling": "squared"}},
     "`data.train.0.loss` over `loss`: `temperature_scaling: squared`"),
    ({"rollout": {"share": 1, "loss": {"lam": 2}}}, "`rollout.loss.lam`: found 2; values from 0"),
    ({"rollout": {"share": 1, "loss": {"lam": 0.2}}, "loss": {"lam": {"adaptive": [0, 1]}}},
     "has an adaptive value, which follows one divergence"),
    ({"rollout": {"share": 1, "estimator": "sampled", "loss": {"order": "rq"}}},
     "`rollout.loss.order` with `rollout.estimator: sampled`"),
    ({"own": {0: {"preset": "sampled_rkl"}}}, "`data.train.0.loss` names the sampled reverse KL"),
    ({"loss": {"divergence": {"sampled_reverse_kl": {}}}}, "`loss` names the sampled reverse KL"),
    ({"own": {0: {"baseline": "none"}}, "rollout": {"share": 1, "estimator": "sampled"}},
     "`data.train.0.loss.baseline` is unknown"),
    ({"rollout": {"share": 1, "estimator": "sampled", "top_p": 0.9}}, "with `rollout.top_p` 0.9"),
    ({"rollout": {"share": 1, "estimator": "sampled", "temperature": 0.5}},
     "with `rollout.temperature` 0.5"),
    ({"rollout": {"share": 1, "estimator": "sampled"}, "loss": {"temperature": 2}},
     "with `rollout.temperature` 1 and another"),
    ({"rollout": {"share": 1, "loss": {"kd_weight": 0, "ce_weight": 1}}},
     "`rollout` with a `kd_weight` of 0: nothing is learnt"),
    ({"teacher": None, "loss": {"token_weight": {"by": "overlap"}}}, "no `teacher` to measure"),
    ({"loss": {"token_weight": 2.0}}, "found 2.0; a section of the keys by, linear, at, over, top"),
    ({"loss": {"lam": {"by": "overlap", "linear": 0.1}}}, "found 0.1; Input should be a valid tup"),
    ({"train": {"steps": 1, "global_batch_size": 1, "statistics": ["overlap", "speed"]}},
     "`train.statistics.1`: found 'speed'"),
    ({"train": {"steps": 1, "global_batch_size": 1, "statistics": ["overlap", "overlap"]}},
     "`train.statistics`: found ['overlap', 'overlap']; each once"),
])
def test_a_loss_that_fits_no_whole_is_refused_by_its_place(changes, message, tmp_path):
    with pytest.raises(InputError) as refused:
        load(tmp_path, **changes)
    assert "has 1 problem(s)" in str(refused.value) and message in str(refused.value)


def test_without_a_teacher_no_loss_has_a_divergence(tmp_path):
    own = {0: {"kd_weight": 2.0, "ce_weight": 0.0, "lam": 0.2}, 1: {"ce_weight": 0.3}}
    recipe = load(tmp_path, teacher=None, loss=BASE | {"token_weight": None}, own=own)
    at = objectives_at(recipe, 0)
    assert [(each.kd_weight, each.ce_weight) for each in (at.base, *at.by_source.values())] == [
        (0, 0.5), (0, 0.5), (0, 0.3)]


def test_a_loss_that_changed_is_another_run_and_new_keys_at_their_defaults_are_not(tmp_path):
    def in_its_folder(**changes) -> Recipe:
        return load(tmp_path, output_dir=str(tmp_path / "run"), **changes)

    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").mkdir()
    began = in_its_folder(loss={"lam": 0.3}, rollout={"share": 0.5})
    old = yaml.safe_load(dump_recipe(began))
    for key in ("power", "token_weight", "normalise"):
        del old["loss"][key]
    for section, keys in ((old["rollout"], ("loss", "estimator")), (old["train"], ("statistics",)),
                          *((source, ("loss",)) for source in old["data"]["train"])):
        for key in keys:
            del section[key]
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(old))
    same = {"loss": {"lam": 0.3}, "rollout": {"share": 0.5}}
    train = {"steps": TOTAL, "global_batch_size": 1, "statistics": ["overlap"]}
    for changes in ({}, {"train": train}, {"rollout": {"share": 0.5, "estimator": "exact"}}):
        refuse_other_run(in_its_folder(**{**same, **changes}))
    # One at the default of `loss`, which the run did not have.
    for changes, key in (({"own": {0: {"lam": 0.1}}}, "data.train.0.loss.lam"),
                         ({"rollout": {"share": 0.5, "loss": {"order": "pr"}}}, "rollout.loss.or"),
                         ({"rollout": {"share": 0.5, "estimator": "sampled"}}, "rollout.estimat"),
                         ({"loss": {"lam": 0.3, "normalise": "sequence"}}, "loss.normalise"),
                         ({"loss": {"lam": 0.3, "token_weight": {"by": "overlap"}}},
                          "loss.token_weight.by"),
                         ({"loss": {"lam": {"by": "overlap"}}}, "loss.lam")):
        with pytest.raises(InputError, match=key):
            refuse_other_run(in_its_folder(**{**same, **changes}))
