"""Rollouts: samples, schedule, replay buffer and loss, each against an independent truth."""

from __future__ import annotations

import collections
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.data import split_documents, write_instructions
from support.models import WORDS, make_model
from support.rank_stats import WatchedRanks
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_metrics, read_metrics, write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Replay
from amid_ds.errors import InputError
from amid_ds.models.sampler import NO_TOKEN, Sampler, SamplerPrompt
from amid_ds.training.job import check_recipe
from amid_ds.training.rollout import choose_source, updated_threshold

END = 3 + WORDS.index("tree")
NEW, LENGTH = 12, 40


@pytest.fixture(scope="module")
def pair(shared_model) -> tuple[Path, Path]:
    return shared_model("llama", 0), shared_model("gpt2", 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder that the module's runs prepare their data in, the first of them for all."""
    return tmp_path_factory.mktemp("prepared") / "data"


@pytest.fixture(scope="module")
def recipe_for(pair, instructions_file, prepared, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, **changes): a recipe that gathers at each use and evaluates at each step."""
    folder = tmp_path_factory.mktemp("rollout")
    held_out = write_instructions(folder / "held.jsonl", rows=8, seed=5)
    evaluated = {"path": str(held_out), "prompt": "prompt", "response": "response"}

    def write(run: Path, **changes) -> Path:
        settings = {"data__prepared": str(prepared), "data__eval": [evaluated],
                    "train__seq_length": LENGTH, "train__eval_every": 1,
                    "train__learning_rate": 1e-2,
                    "deepspeed": str(write_gathering_config(folder)), "checkpoint__every": 1,
                    **changes}
        return write_recipe(run.with_suffix(".yaml"), *pair, instructions_file, run, **settings)
    return write


ALWAYS = {"adaptive": {"init_threshold": 1.0, "capacity": 1000}, "temperature": 0,
          "max_new_tokens": NEW, "end_of_text": "tree"}


def documents(run: Path, step: int) -> list[tuple[list[int], int]]:
    """(ids, where the response begins) of every completion in a checkpoint's buffer."""
    kept = torch.load(run / "checkpoints" / f"step_{step:08d}" / "rollout.pt")
    return [(ids, start) for ids, start, _ in kept]


def read_prompts(prepared: Path, step: int) -> list[list[int]]:
    """The prompts of one step's global batch, in order, from prepared rows and labels alone."""
    from amid_ds.data import PreparedLoader

    data = PreparedLoader(prepared, seed=0, global_batch_size=4, micro_batch_size=1, dp_rank=0,
                          dp_size=1, workers=0)
    return [ids[0, :int((labels != -100).nonzero()[0]) + 1].tolist()
            for batch in data.window(step) for ids, labels in split_documents(batch)]


LAYOUTS = {"one rank": (1, [], {}), "two ranks": (2, [], {"PER_TOKEN": "1"}),
           "tp 2": (2, ["tensor_parallel=2"], {})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_rollouts_are_what_transformers_generates_and_are_learnt_from(layout, pair, prepared,
                                                                             recipe_for, tmp_path):
    """Their weights are gathered once, or once for each token if the student does not fit."""
    ranks, overrides, changes = LAYOUTS[layout]
    run = tmp_path / "run"
    started = Ranks(ranks, "train", recipe_for(run, rollout=ALWAYS, train__steps=2),
                    "train.statistics=[overlap]", *overrides, variables=changes,
                    target=gather_counting_rank)
    assert started.wait() == [0] * ranks, started.output()
    run_ranks(1, "export", run, tmp_path / "after1", "--step", 1)
    teacher = AutoModelForCausalLM.from_pretrained(pair[1])
    buffers = documents(run, 1), documents(run, 2)
    assert buffers[1][:len(buffers[0])] == buffers[0]
    lengths = []
    for step, (model, kept) in enumerate([(pair[0], buffers[0]),
                                          (tmp_path / "after1", buffers[1][len(buffers[0]):])]):
        student = AutoModelForCausalLM.from_pretrained(model)
        assert [ids[:start] for ids, start in kept] == read_prompts(prepared, step)
        losses, overlaps = [], []
        for ids, start in kept:
            truth = student.generate(torch.tensor([ids[:start]]), max_new_tokens=NEW,
                                     do_sample=False, eos_token_id=END, pad_token_id=2)
            assert ids == truth[0].tolist()
            p, q = (model(torch.tensor([ids])).logits[0, start - 1:-1].softmax(-1)
                    for model in (teacher, student))
            losses.append((p * (p.log() - (0.3 * p + 0.7 * q).log())).sum(-1))
            overlaps.append(torch.minimum(p, q).sum(-1))
        lengths.append([len(ids) - start for ids, start in kept])
        line = read_metrics(run)[step]
        assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
        assert line["overlap"] == pytest.approx(torch.cat(overlaps).mean().item(), rel=1e-4)
        assert line["rollout"] == 1
    # Some ended before the others.
    assert len(set(lengths[0])) > 1 and max(lengths[0]) == NEW
    assert line["tokens"] == sum(map(sum, lengths))
    for step, line in enumerate((run / "0.jsonl").read_text().splitlines()):
        gathered, weights, _ = json.loads(line)
        assert gathered == weights * (max(lengths[step]) if changes else 1)


def gather_counting_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that records each rollout's gathered bytes, the student's size and the seconds.

    With the variable PER_TOKEN the whole student does not fit."""
    from amid_ds.engine.engine import Engine
    from amid_ds.training.rollout import Rollouts

    original = Rollouts.batch_for_step

    def counted(self, data):
        gathered = self.engine.gathered_bytes
        before = gathered.student
        self.world.barrier()
        began = time.perf_counter()
        made = original(self, data)
        self.world.barrier()
        seconds = time.perf_counter() - began
        student = self.engine.distiller.student
        weights = sum(p.ds_numel * p.element_size() for p in student.parameters())
        with open(Path(self.recipe.output_dir) / f"{variables['RANK']}.jsonl", "a") as file:
            file.write(json.dumps([gathered.student - before, weights, seconds]) + "\n")
        return made

    Rollouts.batch_for_step = counted
    if "PER_TOKEN" in variables:
        Engine.fits_gathered = lambda *_: False
    rank_main(argv, variables, log)


# Prints a table: run it with -s.
@pytest.mark.slow
def test_what_gathering_once_saves(recipe_for, tmp_path):
    student = make_model(tmp_path / "student", "llama", 0, hidden_size=512, intermediate_size=1536,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    losses = []
    for name, changes in (("once", {}), ("for each token", {"PER_TOKEN": "1"})):
        run = tmp_path / name
        recipe = recipe_for(run, rollout={"share": 1.0, "max_new_tokens": 24}, train__steps=3,
                            student__model=str(student), train__seq_length=LENGTH,
                            data__prepared=str(tmp_path / "data"))
        started = Ranks(2, "train", recipe, "train.eval_every=0", variables=changes,
                        target=gather_counting_rank)
        assert started.wait(400) == [0, 0], started.output()
        rollouts = [json.loads(line) for line in (run / "0.jsonl").read_text().splitlines()]
        print(f"\ngathered {name}: {rollouts[0][0] / 1e6:,.0f} MB of a student of "
              f"{rollouts[0][1] / 1e6:,.0f} MB, "
              f"{statistics.median(seconds for *_, seconds in rollouts):.1f} s a rollout "
              f"(median of {len(rollouts)})")
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[0] == losses[1]


# As the next test, in two more layouts.
@pytest.mark.slow
def test_a_run_with_a_replay_buffer_goes_on_in_any_layout(recipe_for, tmp_path):
    rollout = {"adaptive": {"init_threshold": 0.9, "capacity": 8, "replay_ratio": "constant"},
               "max_new_tokens": NEW}
    recipe = recipe_for(tmp_path / "run", rollout=rollout, train__steps=6, checkpoint__every=3)
    run_ranks(2, "train", recipe)
    whole = read_metrics(tmp_path / "run")
    for ranks, *layout in ((1,), (2, "tensor_parallel=2")):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
        assert "resumed after step 3" in run_ranks(ranks, "train", recipe, *layout).output()
        for line, before in zip(read_metrics(tmp_path / "run"), whole, strict=True):
            assert line["loss"] == pytest.approx(before["loss"], rel=1e-5)
            assert (line["rollout"], line["replay"]) == (before["rollout"], before["replay"])


def test_an_interrupted_run_with_a_replay_buffer_is_the_uninterrupted_one(recipe_for, tmp_path):
    rollout = {"adaptive": {"init_threshold": 0.7, "loss_eps": 0.0, "capacity": 9,
                            "replay_ratio": "constant"},
               "max_new_tokens": NEW, "top_p": 0.9}
    recipe = recipe_for(tmp_path / "run", rollout=rollout, train__steps=9, train__learning_rate=0.1,
                        checkpoint__keep=9)
    run_ranks(2, "train", recipe)
    whole, last = comparable_metrics(tmp_path / "run"), documents(tmp_path / "run", 9)
    assert {(line["rollout"], line["replay"]) for line in whole} == {(0, 0), (1, 0), (1, 1)}
    assert whole[0]["rollout_threshold"] == 0.7 < whole[-1]["rollout_threshold"]
    first = next(line["step"] for line in whole if line["replay"])
    for step in range(first, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert f"resumed after step {first - 1}" in run_ranks(2, "train", recipe).output()
    assert comparable_metrics(tmp_path / "run") == whole
    assert documents(tmp_path / "run", 9) == last and len(last) == 9


@pytest.mark.slow  # three short runs
def test_a_run_that_is_allowed_another_scheme_of_rollouts_goes_on_and_on(recipe_for, tmp_path):
    recipe = recipe_for(tmp_path / "run", rollout={**ALWAYS, "max_new_tokens": 2}, train__steps=3,
                        checkpoint__keep=9)
    run_ranks(1, "train", recipe)
    other = ["rollout={share: 1.0, max_new_tokens: 2}", "checkpoint.allow_change=[rollout]"]
    for last, first in ((1, 2), (2, 3)):
        for step in range(first, 4):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        assert f"resumed after step {last}" in run_ranks(1, "train", recipe, *other).output()


def published(losses, chances, batch, capacity, start, margin, ratio, total):
    """The source of each iteration's rows, by the loop of DistiLLM's finetune.py without models."""
    threshold, previous, memory, choices = start, losses[0], collections.deque(maxlen=capacity), []
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
            choices.append(("fresh", threshold))
        elif r < threshold:
            choices.append(("replay", threshold))
        else:
            choices.append(("data", threshold))
        if losses[iteration] >= previous + margin:
            threshold = min(threshold + 0.1, 1.0)
            previous = losses[iteration]
    return choices


@pytest.mark.parametrize("ratio", ["constant", "increasing", "decreasing"])
def test_the_scheme_is_the_published_one(ratio):
    draw, total = random.Random(3), 400
    losses = [2 + draw.random() + step / 100 for step in range(total + 1)]
    chances = [draw.random() for _ in range(total)]
    adaptive = Replay(init_threshold=0.2, loss_eps=0.1, capacity=100, replay_ratio=ratio)
    state, kept, choices = updated_threshold(adaptive, None, losses[0]), 0, []
    for number in range(1, total + 1):
        what = choose_source(adaptive, state["threshold"], chances[number - 1], kept, number, total)
        choices.append((what, state["threshold"]))
        kept = min(100, kept + 4 * (what == "fresh"))
        state = updated_threshold(adaptive, state, losses[number])
    assert choices == published(losses, chances, 4, 100, 0.2, 0.1, ratio, total)
    assert {what for what, _ in choices} == {"fresh", "replay", "data"}
    assert state["threshold"] == 1.0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_prompts_of_unequal_lengths_share_a_batch_without_a_trace(family, tmp_path):
    """Learned positions, a sliding window, rotary ones; the longest reaches the last position."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", family, 3)).eval()
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = [SamplerPrompt(torch.randint(3, vocabulary, (length,), generator=draw).tolist(),
                             room, 0)
               for length, room in ((3, 60), (40, 5), (1, 30), (120, 8))]
    completions = Sampler(0.0, 1.0, (END,), vocabulary).complete(model, prompts, bool,
                                                              torch.device("cpu"))
    for prompt, ids in zip(prompts, completions, strict=True):
        truth = model.generate(torch.tensor([prompt.ids]), max_new_tokens=prompt.room,
                               do_sample=False, eos_token_id=END, pad_token_id=2)
        assert prompt.ids + ids == truth[0].tolist()


@pytest.mark.parametrize("change", ["train.eval_every=3", "data.eval.0.path=rows.jsonl"])
def test_what_the_threshold_follows_does_not_change_between_attempts(change, recipe_for,
                                                                     instructions_file, tmp_path):
    change = change.replace("rows.jsonl", str(instructions_file))
    for rollout in (ALWAYS, {"share": 0.5, "max_new_tokens": NEW}):
        run = tmp_path / ("adaptive" if rollout is ALWAYS else "share")
        recipe = recipe_for(run, rollout=rollout)
        run.mkdir()
        (run / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
        changed = load_recipe(recipe, [change])
        refused = pytest.raises(InputError, match=change.partition("=")[0])
        with refused if rollout is ALWAYS else nullcontext():
            check_recipe(changed, 1)
        check_recipe(load_recipe(recipe,
                          [change, "checkpoint.allow_change=[data.eval, train.eval_every]"]), 1)


def test_sampling_follows_temperature_and_top_p(pair):
    student = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    prompt, draws, vocabulary = [5, 9, 4], 4000, student.config.vocab_size
    sampler = Sampler(0.7, 0.8, (END,), vocabulary)
    completions = sampler.complete(student,
                                   [SamplerPrompt(prompt, 2, seed) for seed in range(draws)],
                                   bool, torch.device("cpu"))

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
        # The nucleus is neither one token nor all.
        assert 1 < kept.sum() < vocabulary
        chi = ((counts - len(tokens) * truth)[kept] ** 2 / (len(tokens) * truth[kept])).sum()
        freedom = kept.sum() - 1
        # Five standard deviations.
        assert chi < freedom + 5 * (2 * freedom) ** 0.5

    check([ids[0] for ids in completions], expected(prompt))
    common = collections.Counter(ids[0] for ids in completions
                                 if ids[0] != END).most_common(1)[0][0]
    check([ids[1] for ids in completions if ids[0] == common], expected([*prompt, common]))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
def test_logits_that_are_no_distributions_choose_nothing(temperature, top_p):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1, nan, 0], [nan] * 3, [inf, 0, 0], [-inf] * 3, [-inf, 5, -inf]])
    chosen = Sampler(temperature, top_p, (0,), 3).choose(logits,
                                                      torch.tensor([0.1, 0.1, 0.1, 0.1, 0.99]))
    assert chosen.tolist() == [NO_TOKEN] * 4 + [1]


def test_a_step_on_the_data_among_many_on_the_students_samples_is_no_spike(caplog):
    watch = WatchedRanks(1)
    for step in range(1, 301):
        sampled = step % 5 != 0
        spike = step in (240, 241, 242, 243, 244, 245)
        watch.step(step, [((0.1 if sampled else 2.0) * (3 if spike else 1), 0.1)],
                   sampled=sampled)
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "the loss spikes: 6 in step 240, the median of the 20 steps before is 2",
        "the loss spikes: 0.3 in step 241, the median of the 20 steps before is 0.1"]
