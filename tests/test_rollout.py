"""Rollouts: what the student samples, when, and what is learnt from it, each against something written apart."""

from __future__ import annotations

import collections
import json
import random
import shutil
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import small
import torch
from test_train import comparable
from transformers import AutoModelForCausalLM

from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Replay
from amid_ds.errors import InputError
from amid_ds.models.sampler import NO_TOKEN, Sampler, SamplerPrompt
from amid_ds.monitor.anomalies import AnomalyMonitor
from amid_ds.training.job import check_recipe
from amid_ds.training.rollout import choose_source, updated_threshold

END = 3 + small.WORDS.index("tree")
NEW, LENGTH = 12, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rollout")
    small.make_model(root / "student", "llama", 0)
    small.make_model(root / "teacher", "gpt2", 1)
    small.make_instructions(root / "rows.jsonl")
    small.make_instructions(root / "held.jsonl", rows=8, seed=5)
    return root


def recipe_for(folder: Path, run: Path, **changes) -> Path:
    settings = {
        "data__prepared": str(folder / "data"), "train__seq_length": LENGTH, "train__eval_every": 1,
        "data__eval": [{"path": str(folder / "held.jsonl"), "prompt": "prompt", "response": "response"}],
        "deepspeed": str(small.never_resident(folder)), "checkpoint__every": 1, "train__learning_rate": 1e-2,
        **changes}
    return small.make_recipe(run.with_suffix(".yaml"), folder / "student", folder / "teacher", folder / "rows.jsonl",
                             run, **settings)


ALWAYS = {"adaptive": {"init_threshold": 1.0, "capacity": 1000}, "temperature": 0, "max_new_tokens": NEW,
          "end_of_text": "tree"}


def documents(run: Path, step: int) -> list[tuple[list[int], int]]:
    """(ids, where the response begins) of every completion in a checkpoint's buffer."""
    kept = torch.load(run / "checkpoints" / f"step_{step:08d}" / "rollout.pt")
    return [(ids, start) for ids, start, _ in kept]


def prompts_of(folder: Path, step: int) -> list[list[int]]:
    """The prompts of one step's global batch, in order, from the prepared rows and the labels alone."""
    from amid_ds.data import StepData

    data = StepData(folder / "data", seed=0, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1, workers=0)
    return [ids[0, :int((labels != -100).nonzero()[0]) + 1].tolist()
            for batch in data.window(step) for ids, labels in small.documents(batch)]


LAYOUTS = {"one rank": (1, [], {}), "two ranks": (2, [], {"PER_TOKEN": "1"}), "tp 2": (2, ["tensor_parallel=2"], {})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_rollouts_are_what_transformers_generates_and_are_learnt_from(layout, folder, tmp_path):
    """And their weights are gathered once, or, where there is no room for all of them, once for each token."""
    ranks, overrides, changes = LAYOUTS[layout]
    run = tmp_path / "run"
    started = small.Ranks(ranks, "train", recipe_for(folder, run, rollout=ALWAYS, train__steps=2), *overrides,
                          changes=changes, be=be_counted)
    assert started.wait() == [0] * ranks, started.text()
    small.run(1, "export", run, tmp_path / "after1", "--step", 1)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    buffers = documents(run, 1), documents(run, 2)
    assert buffers[1][:len(buffers[0])] == buffers[0]
    lengths = []
    for step, (model, found) in enumerate([(folder / "student", buffers[0]),
                                           (tmp_path / "after1", buffers[1][len(buffers[0]):])]):
        student = AutoModelForCausalLM.from_pretrained(model)
        assert [ids[:start] for ids, start in found] == prompts_of(folder, step)
        losses = []
        for ids, start in found:
            truth = student.generate(torch.tensor([ids[:start]]), max_new_tokens=NEW, do_sample=False,
                                     eos_token_id=END, pad_token_id=2)
            assert ids == truth[0].tolist()
            p, q = (model(torch.tensor([ids])).logits[0, start - 1:-1].softmax(-1) for model in (teacher, student))
            losses.append((p * (p.log() - (0.3 * p + 0.7 * q).log())).sum(-1))
        lengths.append([len(ids) - start for ids, start in found])
        line = small.metrics(run)[step]
        assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4) and line["rollout"] == 1
    assert len(set(lengths[0])) > 1 and max(lengths[0]) == NEW      # some came to their end before the others
    assert line["tokens"] == sum(map(sum, lengths))
    for step, line in enumerate((run / "0.jsonl").read_text().splitlines()):
        gathered, weights, _ = json.loads(line)
        assert gathered == weights * (max(lengths[step]) if changes else 1)


def be_counted(argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank that writes the bytes that each rollout gathers, those of its student, and the rollout's seconds; with
    PER_TOKEN there is no room for the whole student."""
    from amid_ds.engine import engine
    from amid_ds.training import rollout

    turn = rollout.Rollouts.turn

    def counted(self, data):
        before = self.ds.gathered.student
        self.world.barrier()
        began = time.perf_counter()
        made = turn(self, data)
        self.world.barrier()
        seconds = time.perf_counter() - began
        weights = sum(p.ds_numel * p.element_size() for p in self.ds.module.student.parameters())
        with open(Path(self.recipe.output_dir) / f"{variables['RANK']}.jsonl", "a") as file:
            file.write(json.dumps([self.ds.gathered.student - before, weights, seconds]) + "\n")
        return made

    rollout.Rollouts.turn = counted
    if "PER_TOKEN" in variables:
        engine.fits_whole = lambda *_: False
    small.be_a_rank(argv, variables, log)


@pytest.mark.slow      # a table rather than a claim: run it with -s
def test_what_gathering_once_saves(folder, tmp_path):
    student = small.make_model(tmp_path / "student", "llama", 0, hidden_size=512, intermediate_size=1536,
                               num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    losses = []
    for name, changes in (("once", {}), ("for each token", {"PER_TOKEN": "1"})):
        run = tmp_path / name
        recipe = recipe_for(folder, run, rollout={"share": 1.0, "max_new_tokens": 24}, train__steps=3,
                            student__model=str(student), train__seq_length=LENGTH,
                            data__prepared=str(tmp_path / "data"))
        started = small.Ranks(2, "train", recipe, "train.eval_every=0", changes=changes, be=be_counted)
        assert started.wait(400) == [0, 0], started.text()
        rollouts = [json.loads(line) for line in (run / "0.jsonl").read_text().splitlines()]
        print(f"\ngathered {name}: {rollouts[0][0] / 1e6:,.0f} MB of a student of {rollouts[0][1] / 1e6:,.0f} MB, "
              f"{statistics.median(seconds for *_, seconds in rollouts):.1f} s a rollout (median of {len(rollouts)})")
        losses.append([line["loss"] for line in small.metrics(run)])
    assert losses[0] == losses[1]


@pytest.mark.slow      # the same as below, in two more layouts
def test_a_run_with_a_replay_buffer_goes_on_in_any_layout(folder, tmp_path):
    rollout = {"adaptive": {"init_threshold": 0.9, "capacity": 8, "replay_ratio": "constant"}, "max_new_tokens": NEW}
    recipe = recipe_for(folder, tmp_path / "run", rollout=rollout, train__steps=6, checkpoint__every=3)
    small.run(2, "train", recipe)
    whole = small.metrics(tmp_path / "run")
    for ranks, *layout in ((1,), (2, "tensor_parallel=2")):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
        assert "resumed after step 3" in small.run(ranks, "train", recipe, *layout).text()
        for line, before in zip(small.metrics(tmp_path / "run"), whole, strict=True):
            assert line["loss"] == pytest.approx(before["loss"], rel=1e-5)
            assert (line["rollout"], line["replay"]) == (before["rollout"], before["replay"])


def test_an_interrupted_run_with_a_replay_buffer_is_the_uninterrupted_one(folder, tmp_path):
    rollout = {"adaptive": {"init_threshold": 0.7, "loss_eps": 0.0, "capacity": 9, "replay_ratio": "constant"},
               "max_new_tokens": NEW, "top_p": 0.9}
    recipe = recipe_for(folder, tmp_path / "run", rollout=rollout, train__steps=9, train__learning_rate=0.1,
                        checkpoint__keep=9)
    small.run(2, "train", recipe)
    whole, last = comparable(tmp_path / "run"), documents(tmp_path / "run", 9)
    assert {(line["rollout"], line["replay"]) for line in whole} == {(0, 0), (1, 0), (1, 1)}
    assert whole[0]["rollout_threshold"] == 0.7 < whole[-1]["rollout_threshold"]
    first = next(line["step"] for line in whole if line["replay"])
    for step in range(first, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert f"resumed after step {first - 1}" in small.run(2, "train", recipe).text()
    assert comparable(tmp_path / "run") == whole
    assert documents(tmp_path / "run", 9) == last and len(last) == 9


@pytest.mark.slow      # three short runs
def test_a_run_that_is_allowed_another_scheme_of_rollouts_goes_on_and_on(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "run", rollout={**ALWAYS, "max_new_tokens": 2}, train__steps=3,
                        checkpoint__keep=9)
    small.run(1, "train", recipe)
    other = ["rollout={share: 1.0, max_new_tokens: 2}", "checkpoint.allow_change=[rollout]"]
    for last, first in ((1, 2), (2, 3)):
        for step in range(first, 4):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        assert f"resumed after step {last}" in small.run(1, "train", recipe, *other).text()


def published(losses, chances, batch, capacity, start, margin, ratio, total):
    """DistiLLM's loop as its finetune.py has it, without the models: what each iteration learns from."""
    threshold, previous, memory, told = start, losses[0], collections.deque(maxlen=capacity), []
    for iteration in range(1, total + 1):
        r = chances[iteration - 1]
        if ratio == "constant":
            sampling = threshold * 0.5
        elif ratio == "increasing":
            sampling = threshold * iteration / total
        else:
            sampling = threshold * (1 - iteration / total)
        if r < sampling or (r < threshold and len(memory) < capacity):
            memory.extend(range(batch))
            told.append(("fresh", threshold))
        elif r < threshold:
            told.append(("replay", threshold))
        else:
            told.append(("data", threshold))
        if losses[iteration] >= previous + margin:
            threshold = min(threshold + 0.1, 1.0)
            previous = losses[iteration]
    return told


@pytest.mark.parametrize("ratio", ["constant", "increasing", "decreasing"])
def test_the_scheme_is_the_published_one(ratio):
    draw, total = random.Random(3), 400
    losses = [2 + draw.random() + step / 100 for step in range(total + 1)]
    chances = [draw.random() for _ in range(total)]
    adaptive = Replay(init_threshold=0.2, loss_eps=0.1, capacity=100, replay_ratio=ratio)
    state, kept, told = updated_threshold(adaptive, None, losses[0]), 0, []
    for number in range(1, total + 1):
        what = choose_source(adaptive, state["threshold"], chances[number - 1], kept, number, total)
        told.append((what, state["threshold"]))
        kept = min(100, kept + 4 * (what == "fresh"))
        state = updated_threshold(adaptive, state, losses[number])
    assert told == published(losses, chances, 4, 100, 0.2, 0.1, ratio, total)
    assert {what for what, _ in told} == {"fresh", "replay", "data"} and state["threshold"] == 1.0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_prompts_of_unequal_lengths_share_a_batch_without_a_trace(family, tmp_path):
    """Learned positions, a sliding window, rotary ones; the longest takes the model's last position."""
    model = AutoModelForCausalLM.from_pretrained(small.make_model(tmp_path / "model", family, 3)).eval()
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = [SamplerPrompt(torch.randint(3, vocabulary, (length,), generator=draw).tolist(), room, 0)
               for length, room in ((3, 60), (40, 5), (1, 30), (120, 8))]
    found = Sampler(0.0, 1.0, END, vocabulary).complete(model, prompts, bool, torch.device("cpu"))
    for prompt, ids in zip(prompts, found, strict=True):
        truth = model.generate(torch.tensor([prompt.ids]), max_new_tokens=prompt.room, do_sample=False,
                               eos_token_id=END, pad_token_id=2)
        assert prompt.ids + ids == truth[0].tolist()


@pytest.mark.parametrize("change", ["train.eval_every=3", "data.eval.0.path=rows.jsonl"])
def test_what_the_threshold_listens_to_does_not_change_between_lives(change, folder, tmp_path):
    change = change.replace("rows.jsonl", str(folder / "rows.jsonl"))
    for rollout in (ALWAYS, {"share": 0.5, "max_new_tokens": NEW}):
        run = tmp_path / ("adaptive" if rollout is ALWAYS else "share")
        recipe = recipe_for(folder, run, rollout=rollout)
        run.mkdir()
        (run / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
        changed = load_recipe(recipe, [change])
        with pytest.raises(InputError, match=change.partition("=")[0]) if rollout is ALWAYS else nullcontext():
            check_recipe(changed, 1)
        check_recipe(load_recipe(recipe, [change, "checkpoint.allow_change=[data.eval, train.eval_every]"]), 1)


def test_sampling_follows_temperature_and_top_p(folder):
    student = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    prompt, draws, vocabulary = [5, 9, 4], 4000, student.config.vocab_size
    sampler = Sampler(0.7, 0.8, END, vocabulary)
    found = sampler.complete(student, [SamplerPrompt(prompt, 2, seed) for seed in range(draws)], bool, torch.device("cpu"))

    def expected(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            q = (student(torch.tensor([ids])).logits[0, -1].double() / 0.7).softmax(-1)
        order = sorted(range(vocabulary), key=lambda i: -q[i])
        kept, mass = [], 0.0
        while mass < 0.8:
            kept.append(order[len(kept)])
            mass += q[kept[-1]].item()
        nucleus = torch.zeros(vocabulary, dtype=torch.float64)
        nucleus[kept] = q[kept] / mass
        return nucleus

    def check(tokens: list[int], truth: torch.Tensor) -> None:
        counts = torch.bincount(torch.tensor(tokens), minlength=vocabulary).double()
        assert (counts[truth == 0] == 0).all()
        kept = truth > 0
        assert 1 < kept.sum() < vocabulary      # neither greedy nor everything
        chi = ((counts - len(tokens) * truth)[kept] ** 2 / (len(tokens) * truth[kept])).sum()
        freedom = kept.sum() - 1
        assert chi < freedom + 5 * (2 * freedom) ** 0.5      # five standard deviations

    check([ids[0] for ids in found], expected(prompt))
    common = collections.Counter(ids[0] for ids in found if ids[0] != END).most_common(1)[0][0]
    check([ids[1] for ids in found if ids[0] == common], expected([*prompt, common]))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
def test_logits_that_are_no_distributions_choose_nothing(temperature, top_p):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1, nan, 0], [nan] * 3, [inf, 0, 0], [-inf] * 3, [-inf, 5, -inf]])
    chosen = Sampler(temperature, top_p, 0, 3).choose(logits, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.99]))
    assert chosen.tolist() == [NO_TOKEN] * 4 + [1]


def test_a_step_on_the_data_among_many_on_the_students_words_is_no_spike():
    said: list[str] = []
    watch = AnomalyMonitor(["rank 0"], said.append)
    for step in range(1, 301):
        sampled = step % 5 != 0
        spike = step in (240, 241, 242, 243, 244, 245)
        watch.step(step, [[(0.1 if sampled else 2.0) * (3 if spike else 1), 0.1, 0.0]], 1.0, sampled)
    assert [line.split(" in the middle")[0].rpartition(": ")[2] for line in said] == ["6 in step 240, 2",
                                                                                      "0.3 in step 241, 0.1"]
