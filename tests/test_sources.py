"""What is learnt by source, and means over sequences: runs against a float64 loop of their own."""

from __future__ import annotations

import functools
import gc
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.data import split_documents, write_instructions, write_texts
from support.ranks import run_ranks
from support.reference_loop import reference_adamw
from support.runs import (
    comparable_metrics,
    read_metrics,
    write_gathering_config,
    write_recipe,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.data import PreparedLoader, load_tokenizer, prepare
from amid_ds.data.batch import Batch, TokenRow, collate_rows
from amid_ds.errors import InputError
from amid_ds.losses import AMiD, PerToken
from amid_ds.models.distiller import Distiller, LossPart, StepObjective, StepObjectives
from amid_ds.models.heads import logits_of, run_body
from amid_ds.planning.devices import find_device
from amid_ds.planning.plan import make_plan
from amid_ds.training.compatibility import refuse_other_run
from amid_ds.training.objective import objectives_at
from amid_ds.training.step import _bad_places

STEPS = 3
TRAIN = {"steps": STEPS, "seq_length": 24, "micro_batch_size": 2, "global_batch_size": 12,
         "learning_rate": 3e-3, "schedule": "constant"}
# (log p, log q, their mixture's log r) of a token to its divergence.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pr": lambda p, q, r: (p.exp() * (p - r)).sum(-1),
    "qr": lambda p, q, r: (q.exp() * (q - r)).sum(-1)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[dict]:
    """Text, whose rows are sequences, and instructions, several of which share a row."""
    folder = tmp_path_factory.mktemp("sources")
    return [{"path": str(write_texts(folder / "text.jsonl")), "text": "text", "weight": 1.0},
            {"path": str(write_instructions(folder / "asked.jsonl")), "prompt": "prompt",
             "response": "response", "weight": 2.0}]


def row(length: int, spans: Sequence[int], starts: Sequence[int] = ()) -> TokenRow:
    return TokenRow(np.arange(length), np.array(spans, np.int32), np.array(starts, np.int32), "")


def test_a_sequence_is_a_document_that_is_kept_apart_or_else_a_row():
    # Two documents and one without a label between them; nothing; one that is cut.
    rows = [row(12, (2, 4, 9, 12), (5, 8)), row(3, ()), row(6, (1, 6))]
    batch = collate_rows(rows, [], [1, 0, 2])
    assert batch.sequences.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2] and batch.sequence_count == 3
    assert batch.source_numbers.tolist() == [1] * 5 + [2] * 5
    weights = batch.sequence_weights(6.0)
    expected = [1 / 12] * 2 + [1 / 18] * 3 + [1 / 30] * 5
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-7, atol=0)
    # Where documents are not known, positions tell them; without positions a row is one.
    told = Batch(batch.input_ids, batch.labels, batch.positions, 0, [], [])
    assert torch.equal(told.sequences, batch.sequences)
    alone = Batch(batch.input_ids, batch.labels, None, 0, [], [])
    assert alone.sequences.tolist() == [0] * 5 + [1] * 5
    empty = collate_rows([row(3, ())], [])
    assert empty.sequence_count == 0 and empty.sequence_weights(0.0).tolist() == []


BASE = StepObjective(AMiD(lam=0.3), kd_weight=1.0, ce_weight=0.5)
OTHER = StepObjective(AMiD(lam=0.6, order="qr"), kd_weight=0.7, ce_weight=0.0)
WORDS_ALONE = StepObjective(AMiD(lam=0.6), kd_weight=0.0, ce_weight=1.0)


@pytest.fixture(scope="module")
def distiller(shared_model) -> Distiller:
    student, teacher = (AutoModelForCausalLM.from_pretrained(shared_model(family, seed))
                        for seed, family in enumerate(("llama-tied", "gpt2")))
    return Distiller(student, teacher, vocab_size=30)


def test_each_token_is_learnt_as_its_source_says(distiller):
    rows = [row(12, (2, 4, 9, 12), (5, 8)), row(7, (1, 7)), row(6, (2, 6)), row(9, (5, 9))]
    batch = collate_rows(rows, [], [1, 0, 2, 0])
    objectives = StepObjectives(BASE, BASE, {0: BASE, 1: OTHER, 2: BASE})
    parts = objectives.parts(batch, sampled=False)
    assert [part.objective for part in parts] == [BASE, OTHER]
    weights = torch.linspace(0.1, 1, len(batch.valid))
    teacher_hidden, = distiller.teacher_hidden_states([batch], 1)
    own = distiller(batch.input_ids, batch.valid, batch.targets, weights, teacher_hidden,
                    batch.positions, parts=parts, documents=batch.documents)
    distiller.zero_grad()
    own.loss.backward()
    gradients = [parameter.grad.clone() for parameter in distiller.student.parameters()]
    log_q, log_p = (logits_of(head, hidden).double()[:, :30].log_softmax(-1)
                    for head, hidden in zip(distiller.head.heads(), grad_hidden_states(
                        distiller, batch), strict=True))
    loss = kd_sum = 0
    for i, source in enumerate(batch.source_numbers.tolist()):
        kind = objectives.by_source[source]
        lam, order = kind.amid.lam, kind.amid.order
        log_r = torch.log(lam * log_p[i].exp() + (1 - lam) * log_q[i].exp())
        kd = DIVERGENCES[order](log_p[i], log_q[i], log_r)
        ce = -log_q[i, batch.targets[i]]
        loss = loss + weights[i] * (kind.kd_weight * kd + kind.ce_weight * ce)
        kd_sum += weights[i] * kd.item()
        # Cross entropy that is not learnt may be infinite and is no place of a NaN.
        expected = [kd.item(), ce.item() if kind.ce_weight else 0.0]
        assert own.tokens[i].tolist() == pytest.approx(expected, rel=1e-4)
    assert own.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert own.kd.item() == pytest.approx(kd_sum.item(), rel=1e-5)
    distiller.zero_grad()
    loss.backward()
    for parameter, gradient in zip(distiller.student.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_nan_is_named_by_its_row_whichever_loss_its_token_has(distiller):
    rows = [row(7, (1, 7))._replace(source="a line 1"), row(6, (2, 6))._replace(source="b line 4"),
            row(6, (2, 6))._replace(source="a line 2")]
    batch = collate_rows(rows, [], [0, 1, 0])
    parts = StepObjectives(BASE, BASE, {0: BASE, 1: OTHER}).parts(batch, sampled=False)
    teacher_hidden, = distiller.teacher_hidden_states([batch], 1)
    student_hidden = grad_hidden_states(distiller, batch)[0].detach()
    # The second of its tokens with a label, which are the row's from 2 on.
    student_hidden[6 + 1] = torch.nan
    out = distiller.head(student_hidden, teacher_hidden, batch.targets,
                         torch.ones(len(batch.valid)), parts=parts)
    place, = _bad_places(batch, out.tokens)
    assert place.startswith("b line 4 (the divergence at token 3 of the row, which id 3 follows")


def test_the_tokens_of_a_sequence_are_chosen_within_it_whatever_stands_beside_it(distiller):
    chosen = StepObjective(AMiD(lam=0.6, token_weight=PerToken("teacher_entropy", top=0.5)), 1.0,
                           0.0)
    rows = [row(12, (2, 5, 8, 12), (6,)), row(7, (1, 7)), row(6, (2, 6))]
    batch = collate_rows(rows, [], [1, 0, 1])
    parts = StepObjectives(BASE, BASE, {0: BASE, 1: chosen}).parts(batch, sampled=False)
    weights = torch.ones(len(batch.valid))
    teacher_hidden, = distiller.teacher_hidden_states([batch], 1)
    whole, none = (distiller(batch.input_ids, batch.valid, batch.targets, weights, teacher_hidden,
                             batch.positions, batch.sequences, parts=own,
                             documents=batch.documents) for own in (parts, [LossPart(BASE)]))
    logits = logits_of(distiller.head.heads()[1], teacher_hidden)[:, :30].double()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    expected = sum(none.tokens[i] @ torch.tensor([1.0, 0.5])
                   for i in range(len(weights)) if batch.source_numbers[i] == 0)
    for sequence in (0, 1, 3):
        own = (batch.sequences == sequence).nonzero()[:, 0]
        best = own[entropy[own].argsort(descending=True)[:-(-len(own) // 2)]]
        expected += whole.tokens[best, 0].sum()
    assert whole.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def grad_hidden_states(distiller: Distiller, batch: Batch) -> list[Tensor]:
    """Both models' hidden states at the labels, the student's with its graph."""
    states = [run_body(model, batch.input_ids, batch.positions).flatten(0, 1)[batch.valid]
              for model in (distiller.student, distiller.teacher)]
    return [states[0], states[1].detach()]


def test_a_kind_without_a_token_is_left_out_and_one_part_stays(distiller):
    objectives = StepObjectives(BASE, OTHER, {0: BASE, 1: OTHER, 2: BASE})
    alike = collate_rows([row(7, (1, 7)), row(6, (2, 6))], [], [2, 0])
    # The row of the other source has no label.
    silent = collate_rows([row(7, ()), row(6, (2, 6))], [], [0, 1])
    empty = collate_rows([row(3, ())], [])
    found = [objectives.parts(batch, sampled=False) for batch in (alike, silent, empty)]
    assert found == [[LossPart(BASE)], [LossPart(OTHER)], [LossPart(BASE)]]
    assert objectives.parts(alike, sampled=True) == [LossPart(OTHER)]
    hidden, head = torch.zeros(0, 32, requires_grad=True), distiller.student.lm_head.weight
    out = distiller.head(hidden, None, torch.zeros(0).long(), torch.zeros(0), parts=found[2])
    out.loss.backward()
    assert head.grad is not None and out.tokens.shape == (0, 2)


def test_parts_are_compared_by_their_tokens():
    """As DeepSpeed does with those of tensor-parallel peers before a run's first forward pass."""
    batch = collate_rows([row(7, (1, 7)), row(6, (2, 6))], [], [1, 0])
    parts, other = (StepObjectives(BASE, BASE, {0: BASE, 1: kind}).parts(batch, sampled=False)
                    for kind in (OTHER, WORDS_ALONE))
    assert len(parts) == 2 and parts == pickle.loads(pickle.dumps(parts)) != other
    moved = [part._replace(tokens=part.tokens.roll(1)) for part in parts]
    assert parts != moved and parts[0] != parts[0]._replace(tokens=None)


def test_a_step_runs_the_teacher_where_any_of_its_origins_may_need_it(distiller):
    mixed = StepObjectives(BASE, WORDS_ALONE, {0: WORDS_ALONE, 1: BASE})
    alone = StepObjectives(BASE, BASE, {0: WORDS_ALONE})
    assert distiller.uses_teacher(mixed.of_step(False))
    assert not distiller.uses_teacher(mixed.of_step(True))
    assert not distiller.uses_teacher(alone.of_step(False))
    assert distiller.uses_teacher(StepObjectives(BASE, WORDS_ALONE).of_step(False))


def reference_metrics(student: Path, teacher: Path, prepared: Path, sources: list[dict],
                      losses: Sequence[dict], normalise: str) -> list[dict]:
    """Each step's metrics with the loss of each source, in float64, a document at a time."""
    model, guide = (AutoModelForCausalLM.from_pretrained(path).double()
                    for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    optimizer = reference_adamw(model, {})
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    rows = PreparedLoader(prepared, seed=0, global_batch_size=12, micro_batch_size=1, dp_rank=0,
                          dp_size=1, workers=0, weights=[source["weight"] for source in sources])
    lines = []
    for step in range(STEPS):
        total = {"loss": [], "kd_loss": [], "ce_loss": []}
        for batch in rows.window(step):
            own, = (loss for loss, source in zip(losses, sources, strict=True)
                    if batch.sources[0].startswith(source["path"]))
            for ids, labels in split_documents(batch):
                keep = labels != -100
                if not keep.any():
                    continue
                log_q = model(ids).logits[0, keep, :vocabulary].log_softmax(-1)
                with torch.no_grad():
                    log_p = guide(ids).logits[0, keep, :vocabulary].log_softmax(-1)
                log_r = torch.log(own["lam"] * log_p.exp() + (1 - own["lam"]) * log_q.exp())
                kd = DIVERGENCES[own["order"]](log_p, log_q, log_r)
                ce = F.nll_loss(log_q, labels[keep], reduction="none")
                loss = own.get("kd_weight", 1.0) * kd + own["ce_weight"] * ce
                for name, values in (("loss", loss), ("kd_loss", kd), ("ce_loss", ce)):
                    total[name].append(values.mean()[None] if normalise == "sequence" else values)
        means = {name: torch.cat(values).mean() for name, values in total.items()}
        optimizer.zero_grad()
        means["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append({**{name: mean.item() for name, mean in means.items()},
                      "grad_norm": norm.item()})
    return lines


def require_same(run: Path, truth: list[dict]) -> None:
    for line, expected in zip(read_metrics(run), truth, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), (run, line["step"], name)


LOSSES = [{"lam": 0.3, "order": "pr", "ce_weight": 0.5},
          {"lam": 0.6, "order": "qr", "kd_weight": 0.7, "ce_weight": 0.0}]


@pytest.fixture(scope="module")
def recipe_for(shared_model, sources, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(normalise): learns from the text and the instructions by LOSSES; every weight is
    gathered at each use."""
    folder = tmp_path_factory.mktemp("recipes")
    base, own = LOSSES

    def write(normalise: str) -> Path:
        return write_recipe(
            folder / f"{normalise}.yaml", shared_model("llama-tied", 0), shared_model("gpt2", 1),
            Path(sources[0]["path"]), folder / normalise,
            data__train=[sources[0], {**sources[1], "loss": own}], train=TRAIN,
            data__prepared=str(folder / "data"), loss={**base, "normalise": normalise},
            deepspeed=str(write_gathering_config(folder)))
    return write


@pytest.fixture(scope="module")
def truth_of(shared_model, sources, recipe_for) -> Callable[[str], list[dict]]:
    """truth_of(normalise): a plain loop's metrics, once the data are prepared."""
    return functools.cache(lambda normalise: reference_metrics(
        shared_model("llama-tied", 0), shared_model("gpt2", 1),
        recipe_for(normalise).parent / "data", sources, LOSSES, normalise))


# Ranks, rows of a micro-batch: three micro-batches, two, three.
LAYOUTS = [pytest.param(1, 4, id="1"), pytest.param(2, 3, id="2"),
           pytest.param(3, 2, id="3", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("ranks", "rows"), LAYOUTS)
def test_losses_of_sources_and_means_over_sequences_are_a_plain_loops_on_any_ranks(
        recipe_for, truth_of, ranks, rows, tmp_path):
    run_ranks(ranks, "train", recipe_for("sequence"), f"output_dir={tmp_path}/run",
              f"train.micro_batch_size={rows}")
    require_same(tmp_path / "run", truth_of("sequence"))


@pytest.mark.slow
def test_a_run_with_losses_of_sources_goes_on_where_it_was(recipe_for, tmp_path):
    run = tmp_path / "run"
    changes = (f"output_dir={run}", "checkpoint.every=2")
    run_ranks(2, "train", recipe_for("sequence"), *changes)
    whole = comparable_metrics(run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    assert "resumed after step 2" in run_ranks(2, "train", recipe_for("sequence"),
                                               *changes).output()
    assert comparable_metrics(run) == whole


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [
    [], ["tensor_parallel=2", "train.micro_batch_size=6"]], ids=["plain", "tp 2"])
def test_losses_of_sources_under_a_mean_over_tokens_are_a_plain_loops(recipe_for, truth_of,
                                                                      overrides, tmp_path):
    run_ranks(2, "train", recipe_for("tokens"), f"output_dir={tmp_path}/run", *overrides)
    require_same(tmp_path / "run", truth_of("tokens"))


def test_what_a_token_is_learnt_by_follows_from_its_origin(recipe_for):
    recipe = recipe_for("tokens")
    by_name = "rollout={share: 0.5, max_new_tokens: 4}", "data.train=[{path: a, prompt: p, " \
        "response: r}, {path: b, prompt: p, response: r, loss: {order: qr, ce_weight: 0.25}}]"
    at = objectives_at(load_recipe(recipe, by_name), 0)
    assert at.by_source == {0: at.base, 1: StepObjective(AMiD(lam=0.3, order="qr"), 1.0, 0.25)}
    # The student's own words are no labels, unless the recipe says so.
    assert at.base == StepObjective(AMiD(lam=0.3), 1.0, 0.5)
    assert at.sampled == StepObjective(AMiD(lam=0.3), 1.0, 0.0)
    own = objectives_at(load_recipe(recipe, [*by_name, "rollout.loss={preset: srkl, lam: 0.9}"]), 0)
    assert own.sampled == StepObjective(AMiD(lam=0.9, order="qr"), 1.0, 0.0)
    said = objectives_at(load_recipe(recipe, [*by_name, "rollout.loss={ce_weight: 0.1}"]), 0)
    assert said.sampled == StepObjective(AMiD(lam=0.3), 1.0, 0.1)
    # Nothing by source where no source says anything.
    assert objectives_at(load_recipe(recipe, ["data.train=[{path: a}, {path: b}]"]),
                         0).by_source == {}


def test_a_sources_loss_is_no_part_of_its_prepared_rows(recipe_for, tmp_path):
    recipe = load_recipe(recipe_for("tokens"))
    tokenizer = load_tokenizer(recipe.student.model)
    plain = [source.model_copy(update={"loss": None}) for source in recipe.data.train]
    prepare(recipe.data.model_copy(update={"train": plain}), 24, tokenizer, tmp_path)
    assert prepare(recipe.data, 24, tokenizer, tmp_path).reused


def test_a_plan_counts_a_gradient_of_the_head_for_each_loss_of_a_micro_batch(recipe_for, distiller):
    recipe, alike = recipe_for("tokens"), "data.train.1.loss=null"
    head = distiller.student.lm_head.weight
    planned = {changes: make_plan(load_recipe(recipe, changes), 1, 2, find_device("cpu", 2))
               .memory_per_rank["loss_workspace"]
               for changes in ((), (alike,), ("train.micro_batch_size=1",),
                               (alike, "train.micro_batch_size=1"))}
    two, one, *of_one_row = planned.values()
    assert two - one == head.numel() * head.element_size() and len(set(of_one_row)) == 1
    batch = collate_rows([row(7, (1, 7)), row(6, (2, 6))], [], [0, 1])
    objectives = StepObjectives(BASE, BASE, {0: BASE, 1: OTHER})
    for parts, held in ((objectives.parts(batch, False), 2), ([LossPart(BASE)], 1)):
        before = len(tensors_like(head))
        out = distiller(batch.input_ids, batch.valid, batch.targets, torch.ones(len(batch.valid)),
                        distiller.teacher_hidden_states([batch], 1)[0], parts=parts)
        assert len(tensors_like(head)) - before == held
        del out


def tensors_like(weight: Tensor) -> list[Tensor]:
    """The tensors of its shape that are alive and no parameters."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, Tensor)
            and found.shape == weight.shape and not isinstance(found, torch.nn.Parameter)]


def test_a_source_learnt_otherwise_is_another_run(recipe_for, tmp_path):
    recipe, folder = recipe_for("tokens"), f"output_dir={tmp_path}"
    began = dump_recipe(load_recipe(recipe, [folder]))
    (tmp_path / "recipe.yaml").write_text(began)
    refuse_other_run(load_recipe(recipe, [folder]))
    for change in ("data.train.1.loss.lam=0.5", "data.train.0.loss={lam: 0.5}",
                   "data.train.1.loss=null"):
        with pytest.raises(InputError, match=change.partition("=")[0].removesuffix(".lam")):
            refuse_other_run(load_recipe(recipe, [folder, change]))
        allowed = "checkpoint.allow_change=[data.train.0.loss, data.train.1.loss]"
        refuse_other_run(load_recipe(recipe, [folder, change, allowed]))
    # A version without the key left a recipe without it.
    old = yaml.safe_load(began)
    for source in old["data"]["train"]:
        del source["loss"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old))
    refuse_other_run(load_recipe(recipe, [folder, "data.train.1.loss=null"]))
