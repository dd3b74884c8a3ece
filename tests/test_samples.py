"""`train.samples`: answers over the course of a run are what transformers generates greedily."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.caches import write_cache
from support.chats import ROLE_TOKENS, make_byte_level
from support.data import write_instructions, write_jsonl, write_texts
from support.families import save_tiny
from support.models import WORDS
from support.nodes import train_on_nodes
from support.ranks import Ranks, rank_main
from support.runs import comparable_results, write_gathering_config, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.models.delta import DeltaTeacher
from amid_ds.models.sampler import Sampler, SamplerPrompt
from amid_ds.training.samples import sample_prompts
from amid_ds.training.sampling import EngineSampler

LENGTH, NEW = 40, 20
STEPS = 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[dict]:
    """Two evaluation sets: prompts with responses, and plain text."""
    folder = tmp_path_factory.mktemp("sets")
    return [{"path": str(write_instructions(folder / "asked.jsonl", rows=6, seed=5)),
             "prompt": "prompt", "response": "response"},
            {"path": str(write_texts(folder / "told.jsonl", rows=2, seed=6)), "text": "text"}]


@pytest.fixture(scope="module")
def recipe_for(shared_model, llama_pair, instructions_file, sets, tmp_path_factory
               ) -> Callable[..., Path]:
    """recipe_for(run, **changes): five prompts, answered and saved after every second step.

    drops: the student has dropout, which would be gone were it left in eval mode.
    """
    folder = tmp_path_factory.mktemp("samples")
    dropping = shared_model("llama", 0, attention_dropout=0.2)

    def write(run: Path, teacher: Path | None = llama_pair[1], drops: bool = False,
              **changes) -> Path:
        settings = {"data__prepared": str(folder / "data"), "data__eval": sets,
                    "train__seq_length": LENGTH, "train__samples": 5, "train__steps": STEPS,
                    "train__eval_every": 2, "train__learning_rate": 0.02, "checkpoint__every": 2,
                    "deepspeed": str(write_gathering_config(folder)), **changes}
        return write_recipe(run.with_suffix(".yaml"), dropping if drops else llama_pair[0], teacher,
                            instructions_file, run, **settings)
    return write


def sampling_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank; with the variable PER_TOKEN no model's weights fit whole."""
    from amid_ds.engine.engine import Engine

    if "PER_TOKEN" in variables:
        Engine.fits_gathered = lambda self, model: False
    rank_main(argv, variables, log)


def train(ranks: int, recipe: Path, *overrides: str, **variables: str) -> Ranks:
    started = Ranks(ranks, "train", recipe, *overrides, variables=variables, target=sampling_rank)
    assert started.wait() == [0] * ranks, started.output()
    return started


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def expected_prompts(sets: Sequence[dict], model: Path) -> list[list[int]]:
    """The ids of five prompts, a set's row in turn; of a text its first half."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked, told = ([json.loads(line) for line in Path(each["path"]).read_text().splitlines()]
                   for each in sets)
    asked = [tokenizer(row["prompt"])["input_ids"] for row in asked]
    told = [ids[:-(-len(ids) // 2)] for ids in (tokenizer(row["text"])["input_ids"]
                                                for row in told)]
    return [asked[0], told[0], asked[1], told[1], asked[2]]


def generated(model: Path, prompts: Sequence[list[int]]) -> list[str]:
    """What transformers makes of them, the most probable token each time."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), plain(model)
    return [tokenizer.decode(loaded.generate(
        torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids):],
        skip_special_tokens=True) for ids in prompts]


@functools.cache
def plain(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model).eval()


def exported(run: Path, step: int, folder: Path) -> Path:
    assert main(["export", str(run), str(folder / str(step)), "--step", str(step)]) == 0
    return folder / str(step)


@pytest.fixture(scope="module")
def sampled(recipe_for, tmp_path_factory) -> Path:
    """A run on two ranks, whose weights are gathered for each evaluation."""
    run = tmp_path_factory.mktemp("sampled") / "run"
    assert "5 prompt(s) answered in" in train(2, recipe_for(run, drops=True)).output()
    return run


def require_transformers_answers(run: Path, sets: Sequence[dict], folder: Path,
                                 teacher: Path | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompts = expected_prompts(sets, run / "model")
    texts = [tokenizer.decode(ids) for ids in prompts]
    taught = [None] * 5 if teacher is None else generated(teacher, prompts)
    expected = [{"step": step, "number": number, "prompt": texts[number], "student": answer,
                 "teacher": taught[number]}
                for step in (2, STEPS)
                for number, answer in enumerate(generated(exported(run, step, folder), prompts))]
    assert lines_of(run) == expected


def test_answers_are_what_transformers_generates_from_each_steps_student_and_the_teacher(
        sampled, sets, llama_pair, tmp_path):
    require_transformers_answers(sampled, sets, tmp_path, llama_pair[1])
    answers = [{line["student"] for line in lines_of(sampled) if line["step"] == step}
               for step in (2, STEPS)]
    # The claim is empty where the student does not learn, or says the same to all.
    assert answers[0] != answers[1] and len(answers[1]) > 1


def test_tensorboard_has_them_as_code(sampled):
    events = EventAccumulator(str(sampled / "tensorboard"))
    events.Reload()
    line = max(lines_of(sampled)[5:], key=lambda line: len(line["student"]))
    notes = events.Tensors(f"samples/{line['number']}/text_summary")
    assert [note.step for note in notes] == [2, STEPS]
    text = notes[1].tensor_proto.string_val[0].decode()
    assert f"student:\n\n    {line['student']}\n\nteacher:\n\n    {line['teacher']}" in text


def test_a_run_without_samples_has_the_same_digits(sampled, recipe_for, tmp_path):
    train(2, recipe_for(tmp_path / "run", drops=True), "train.samples=0")
    assert comparable_results(tmp_path / "run") == comparable_results(sampled)
    assert lines_of(tmp_path / "run") == []


@pytest.mark.slow
def test_a_resumed_run_has_each_answer_once_and_asks_its_teacher_no_more(sampled, recipe_for,
                                                                         tmp_path):
    """The teacher's answers are those that stand in the file, one of which is made up here."""
    run, recipe = tmp_path / "run", recipe_for(tmp_path / "run", drops=True)
    train_on_nodes(2, recipe, run, stop_at=3)
    path = run / "samples.jsonl"
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [2] * 5
    lines[1]["teacher"] = "made up"
    path.write_text("".join(json.dumps(line) + "\n" for line in (
        *lines, {**lines[0], "step": STEPS, "student": "of an attempt that was lost"}))
        + '{"step": 4, "number')
    train(2, recipe)
    expected = lines_of(sampled)
    for line in expected:
        if line["number"] == 1:
            line["teacher"] = "made up"
    assert lines_of(run) == expected
    assert comparable_results(run) == comparable_results(sampled)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, overrides, variables", [
    (1, [], {}), (2, [], {"PER_TOKEN": "1"}), (2, ["tensor_parallel=2"], {}),
    (4, ["tensor_parallel=2"], {"PER_TOKEN": "1"}),
    (2, ["teacher.placement=replicated"], {}),
    (2, ["teacher.placement=replicated"], {"PER_TOKEN": "1"}),
    (4, ["teacher.placement=node", "teacher.shard_over=2"], {}),
    (4, ["teacher.placement=node", "teacher.shard_over=2"], {"PER_TOKEN": "1"}),
    (2, ["deepspeed=ds_configs/zero1_fp32.json"], {})])
def test_every_layout_gives_the_same_answers(sampled, recipe_for, sets, llama_pair, tmp_path, ranks,
                                             overrides, variables):
    run = tmp_path / "run"
    train(ranks, recipe_for(run), *overrides, **variables)
    require_transformers_answers(run, sets, tmp_path, llama_pair[1])


@pytest.mark.slow
def test_without_a_teacher_and_of_a_cached_one_the_answers_are_null(recipe_for, sets, llama_pair,
                                                                    tmp_path):
    alone = recipe_for(tmp_path / "alone", teacher=None)
    train(2, alone)
    require_transformers_answers(tmp_path / "alone", sets, tmp_path / "a", None)
    cache = write_cache(tmp_path / "cache", llama_pair[1],
                        load_recipe(alone).prepared_dir, k=31)
    train(2, recipe_for(tmp_path / "cached"), f"teacher={{cached: {cache}}}")
    require_transformers_answers(tmp_path / "cached", sets, tmp_path / "c", None)


@pytest.mark.slow
def test_a_mean_that_teaches_answers_in_each_evaluation(recipe_for, sets, tmp_path):
    run = tmp_path / "run"
    train(2, recipe_for(run), "teacher={ema: 0.75}", "train.ema=0.75")
    prompts = expected_prompts(sets, run / "model")
    # The same mean is exported.
    expected = [answer for step in (2, STEPS)
                for answer in generated(exported(run, step, tmp_path), prompts)]
    assert [line["teacher"] for line in lines_of(run)] == expected
    assert expected[:5] != expected[5:] and expected != [line["student"] for line in lines_of(run)]


@pytest.mark.slow
@pytest.mark.parametrize("overrides, variables", [
    ([], {}), ([], {"PER_TOKEN": "1"}), (["tensor_parallel=2"], {})])
def test_a_deltas_answers_are_those_of_the_sum(shared_model, recipe_for, sets, llama_pair, tmp_path,
                                               overrides, variables):
    run, base = tmp_path / "run", shared_model("gemma2", 2)
    train(2, recipe_for(run, teacher__delta={"base": {"model": str(base)}, "scale": 0.7}),
          *overrides, **variables)
    own, teacher, before = map(plain, (llama_pair[0], llama_pair[1], base))
    tokenizer, expected = AutoTokenizer.from_pretrained(llama_pair[0]), []
    for ids in expected_prompts(sets, run / "model"):
        said: list[int] = []
        while len(said) < NEW and tokenizer.eos_token_id not in said:
            z = [model(torch.tensor([ids + said])).logits[0, -1].double()
                 for model in (own, teacher, before)]
            said.append(int((z[0] + 0.7 * (z[1] - z[2])).argmax()))
        expected.append(tokenizer.decode(said, skip_special_tokens=True))
    assert [line["teacher"] for line in lines_of(run)] == expected * 2


def test_a_delta_is_sampled_as_the_sum_of_its_models(shared_model, llama_pair):
    """Without ranks, over a cache, where the sum over whole rows is the truth."""
    models = [plain(path) for path in (llama_pair[1], shared_model("gemma2", 2), llama_pair[0])]
    made = Sampler(0.0, 1.0, (1,), 31).complete(
        DeltaTeacher(*models, scale=0.7).eval(), [SamplerPrompt([5, 9, 7], 8, 0)],
        lambda own: own, torch.device("cpu"))[0]
    ids = [5, 9, 7]
    for token in made:
        z = [model(torch.tensor([ids])).logits[0, -1].double() for model in models]
        assert token == int((0.7 * (z[0] - z[1]) + z[2])[:31].argmax())
        ids.append(token)
    assert len(set(made)) > 1


@pytest.mark.slow
def test_to_a_teacher_that_lacks_a_token_the_prompt_is_spelled(recipe_for, llama_pair, tmp_path):
    """The student's new token is `two stone`, which its end of the text is not."""
    student = tmp_path / "student"
    tokenizer, model = AutoTokenizer.from_pretrained(llama_pair[1]), plain(llama_pair[0])
    old = len(tokenizer)
    tokenizer.add_tokens(["two stone"])
    model = AutoModelForCausalLM.from_pretrained(llama_pair[0])
    model.resize_token_embeddings(old + 1)
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    rows = [{"prompt": f"the {word} two stone old ", "response": "river"}
            for word in ("bird", "tree", "house")]
    held = [{"path": str(write_jsonl(tmp_path / "held.jsonl", rows)), "prompt": "prompt",
             "response": "response"}]
    run = tmp_path / "run"
    train(2, recipe_for(run, data__eval=held, teacher__vocabulary="grown",
                        data__prepared=str(tmp_path / "data")), f"student.model={student}",
          "train.samples=3")
    words = AutoTokenizer.from_pretrained(llama_pair[1])
    assert [line["teacher"] for line in lines_of(run)][:3] == generated(
        llama_pair[1], [words(row["prompt"])["input_ids"] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("student, teacher, overrides", [
    ("mixtral", "mixtral", ["expert_parallel=2"]), ("qwen3_next", "granitemoehybrid", []),
    ("mamba2", "mixtral", [])])
def test_mixtures_and_hybrids_answer_as_transformers_has_them(recipe_for, sets, tmp_path, student,
                                                              teacher, overrides):
    # As many rows as the tokenizer has ids: of others transformers may say one.
    pair = [save_tiny(family, tmp_path / name, seed=seed, vocab_size=3 + len(WORDS))
            for seed, (name, family) in enumerate({"student": student, "teacher": teacher}.items())]
    run = tmp_path / "run"
    train(2, recipe_for(run, teacher=pair[1], data__prepared=str(tmp_path / "data")),
          f"student.model={pair[0]}", *overrides)
    require_transformers_answers(run, sets, tmp_path, pair[1])


@pytest.mark.slow
def test_nothing_is_asked_twice_of_a_changed_teacher(sampled, recipe_for, sets, shared_model,
                                                     tmp_path):
    """What the teacher before has said is not taken for another one's."""
    run, other = tmp_path / "run", shared_model("llama", 4)
    shutil.copytree(sampled, run)
    train(2, recipe_for(run, drops=True), f"teacher.model={other}", "train.steps=6",
          "checkpoint.allow_change=[teacher, train.steps]")
    assert [line["teacher"] for line in lines_of(run)][-5:] == generated(
        other, expected_prompts(sets, run / "model"))


@pytest.fixture
def prompts_of(llama_pair, instructions_file, tmp_path) -> Callable[..., list[str]]:
    """prompts_of(count, most, sets, tokenizer): as texts."""
    def prompts(count: int, most: int, eval_sets: Sequence[dict], tokenizer=None) -> list[str]:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(llama_pair[0])
        recipe = load_recipe(write_recipe(
            tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
            data__eval=list(eval_sets), train__samples=count, train__seq_length=LENGTH))
        return [tokenizer.decode(ids) for ids in sample_prompts(recipe, tokenizer, most)]
    return prompts


def test_an_answer_ends_before_a_token_that_ends_a_text(monkeypatch):
    sampler = object.__new__(EngineSampler)
    sampler.sampler = SimpleNamespace(ends=(2, 7))
    monkeypatch.setattr(EngineSampler, "complete",
                        lambda self, prompts, before_pass: [[5, 2, 6], [7], [4, 4]])
    assert sampler.answers([]) == [[5], [], [4, 4]]


def test_prompts_are_the_first_rows_of_every_set_in_turn(prompts_of, sets, llama_pair):
    tokenizer = AutoTokenizer.from_pretrained(llama_pair[0])
    whole = [tokenizer.decode(ids) for ids in expected_prompts(sets, llama_pair[0])]
    assert [prompts_of(count, 99, sets) for count in (1, 3, 5)] == [whole[:1], whole[:3], whole]
    # All that there are.
    assert len(prompts_of(99, 99, sets)) == 8
    # The left side of a prompt that is too long goes, or the right one.
    cut = [" ".join(text.split()[-3:]) for text in whole[::2]]
    assert prompts_of(3, 3, sets[:1]) == cut
    assert prompts_of(3, 3, [{**sets[0], "truncate": "right"}]) == [
        " ".join(text.split()[:3]) for text in whole[::2]]


def test_the_prompt_of_a_conversation_ends_where_the_assistants_last_turn_begins(prompts_of,
                                                                                 tmp_path):
    said = [("user", "the river"), ("assistant", "a bird"), ("user", "the stone"),
            ("assistant", "runs"), ("user", "and then")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said[:count]]}
            for count in (2, 4, 5)]
    held = [{"path": str(write_jsonl(tmp_path / "chats.jsonl", rows)), "messages": "messages"}]
    begin = "<|user|>the river<|end|><|assistant|>"
    longer = f"{begin}a bird<|end|><|user|>the stone<|end|><|assistant|>"
    assert prompts_of(3, 99, held, make_byte_level(ROLE_TOKENS)) == [begin, longer, longer]


def test_a_recipe_without_evaluation_sets_has_nothing_to_sample(llama_pair, text_file, tmp_path,
                                                                capsys):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          train__samples=4)
    assert main(["train", str(recipe)]) == 2
    assert "`train.samples` is 4, and `data.eval` names no set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
