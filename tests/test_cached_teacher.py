"""A cached teacher: the same training as with the live one, its checks, its traces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.caches import log_probabilities, write_cache
from support.ranks import Ranks, run_ranks
from support.runs import comparable_metrics, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.data import PreparedLoader, TargetFolder, load_tokenizer, prepare_all
from amid_ds.errors import InputError
from amid_ds.eval.cached import kl_from
from amid_ds.losses import SparseTargets
from amid_ds.training.job import check_recipe

SKEWED = {"alpha": -3.0, "lam": 0.3, "order": "pr", "ce_weight": 0.5}
FORWARD_KL = {"preset": "fkl", "ce_weight": 0.5}
WORDS = {"text": "text"}


@pytest.fixture(scope="module")
def prepared(llama_pair, text_file, instructions_file, tmp_path_factory) -> Path:
    """The prepared rows of `two_sources`."""
    folder = tmp_path_factory.mktemp("cached")
    recipe = load_recipe(two_sources(folder / "r.yaml", llama_pair, None, text_file,
                                     instructions_file, folder / "none"))
    prepare_all(recipe.data, recipe.train.seq_length, load_tokenizer(str(llama_pair[0])),
                folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def whole(llama_pair, prepared, tmp_path_factory) -> Path:
    """A cache of every id."""
    vocabulary = len(AutoTokenizer.from_pretrained(llama_pair[1]))
    return write_cache(tmp_path_factory.mktemp("whole") / "cache", llama_pair[1], prepared,
                       k=vocabulary)


@pytest.fixture(scope="module")
def eight(llama_pair, prepared, tmp_path_factory) -> Path:
    """A cache of 8 ids a token."""
    return write_cache(tmp_path_factory.mktemp("eight") / "cache", llama_pair[1], prepared, k=8)


@pytest.fixture(scope="module")
def drawn(llama_pair, prepared, tmp_path_factory) -> Path:
    """A cache of 12 draws a token."""
    return write_cache(tmp_path_factory.mktemp("drawn") / "cache", llama_pair[1], prepared,
                       draws=12)


def two_sources(path: Path, pair: tuple[Path, Path], teacher: dict | None, texts: Path,
                instructions: Path, out: Path, **changes) -> Path:
    """A recipe of text with an α of its own, and of instructions; each row is read twice."""
    sources = [{"path": str(texts), **WORDS, "loss": {"alpha": 1.0, "order": "rp"}},
               {"path": str(instructions), "prompt": "prompt", "response": "response"}]
    write_recipe(path, pair[0], None, texts, out, loss=SKEWED,
                 train={"steps": 6, "seq_length": 24, "micro_batch_size": 2,
                        "global_batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2,
                        "statistics": ["label_probability", "student_entropy"]})
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= {"train": sources}
    if teacher is not None:
        recipe["teacher"] = teacher
    path.write_text(yaml.safe_dump(recipe))
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        recipe.setdefault(section, {})[leaf] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe_of(llama_pair, prepared, text_file, instructions_file, tmp_path):
    """recipe(teacher, name, **changes): the path of a recipe of `two_sources` on `prepared`."""
    def make(teacher: dict, name: str, **changes) -> Path:
        return two_sources(tmp_path / f"{name}.yaml", llama_pair, teacher, text_file,
                           instructions_file, tmp_path / name, data__prepared=str(prepared),
                           **changes)
    return make


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same_training(one: Path, other: Path, tolerance: float) -> None:
    for line, expected in zip(comparable_metrics(one), comparable_metrics(other), strict=True):
        assert line == pytest.approx(expected, rel=tolerance), line["step"]
    weights = final_weights(other)
    for name, value in final_weights(one).items():
        assert (value - weights[name]).abs().max() < tolerance, name


LAYOUTS = [pytest.param(1, 1, marks=pytest.mark.slow), (2, 1),
           pytest.param(2, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("ranks, tensor_parallel", LAYOUTS)
def test_a_cache_of_every_id_trains_as_the_live_teacher_does(recipe_of, llama_pair, whole, tmp_path,
                                                             ranks, tensor_parallel):
    """Each source with its own α, in one micro-batch; in fp32."""
    for name, teacher in (("live", {"model": str(llama_pair[1])}), ("cached",
                                                                    {"cached": str(whole)})):
        recipe = recipe_of(teacher, name)
        run_ranks(ranks, "train", recipe, f"tensor_parallel={tensor_parallel}")
    assert_same_training(tmp_path / "cached", tmp_path / "live", 1e-5)
    facts, live = (json.loads((tmp_path / name / "provenance.json").read_text())["teacher"]
                   for name in ("cached", "live"))
    assert {key: facts[key] for key in ("model", "revision", "files_sha256")} == {
        key: live[key] for key in ("model", "revision", "files_sha256")}
    assert facts["cached"] == str(whole) and facts["method"] == "topk"
    card = (tmp_path / "cached" / "model" / "README.md").read_text()
    assert f"distilled from `…/{llama_pair[1].name}` by its distributions in a cache" in card
    measured = json.loads((tmp_path / "cached" / "measured.json").read_text())
    assert measured["memory_per_rank"]["teacher_targets"] > 0
    assert not measured["memory_per_rank"]["teacher_hidden"]


@pytest.mark.parametrize("ranks, micro_batch_size, start", [(1, 1, 0), (2, 1, 3), (2, 2, 40)])
def test_a_row_comes_with_its_own_targets_at_any_step_on_any_rank(
        llama_pair, prepared, eight, ranks, micro_batch_size, start):
    teacher = AutoModelForCausalLM.from_pretrained(llama_pair[1])
    vocabulary = len(AutoTokenizer.from_pretrained(llama_pair[1]))
    cache = TargetFolder.open(eight)
    for rank in range(ranks):
        loader = PreparedLoader(prepared, seed=0, targets=(cache, None), global_batch_size=4,
                                micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=ranks,
                                workers=2)
        for window in loader.windows(start, start + 2):
            for batch in window:
                log_p = log_probabilities(teacher, batch, vocabulary)
                targets = batch.teacher_targets
                assert len(targets) == len(batch.valid) == len(log_p)
                kept = log_p.gather(1, targets.ids).float()
                torch.testing.assert_close(targets.log_probabilities, kept, atol=5e-3, rtol=2e-3)
                torch.testing.assert_close(
                    targets.label_log_probabilities,
                    log_p.gather(1, batch.targets[:, None])[:, 0].float(), atol=1e-3, rtol=1e-3)


def test_a_cache_of_other_rows_is_noticed_even_where_its_manifest_says_they_are_the_same(
        prepared, eight, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(eight, wrong)
    shards = sorted((wrong / "shards").glob("*.arrow"))
    # Rows of instructions for rows of text.
    shutil.copy(shards[-2], shards[0])
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = manifest["shards"][-2]["bytes"]
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    loader = PreparedLoader(prepared, seed=0, targets=(TargetFolder.open(wrong), None),
                            global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1,
                            workers=0)
    with pytest.raises(InputError, match=r"row \d+ has \d+ tokens to learn, and \d+ in the cache"):
        for step in range(20):
            loader.window(step)


@pytest.mark.parametrize("changes, words", [
    ({"rollout": {"share": 1.0}}, "no cache has the student's own words"),
    ({"data__train": [{"path": "x.jsonl", "stream": True}]}, "prepare the data"),
    ({"train__eval_every": 2, "data__eval": [{"path": "x.jsonl", "name": "x"}],
      "checkpoint__best": {"metric": "eval.x.kl_to_teacher", "mode": "min"}},
     "no `teacher` that could be asked, so no kl_to_teacher"),
])
def test_what_no_cache_can_have_is_refused_with_the_recipe(recipe_of, eight, changes, words):
    changes = {key: value for key, value in changes.items()}
    rollout = changes.pop("rollout", None)
    path = recipe_of({"cached": str(eight)}, "refused", **changes)
    if rollout:
        recipe = yaml.safe_load(path.read_text())
        recipe["rollout"], recipe["data"]["train"] = rollout, recipe["data"]["train"][1:]
        path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=words):
        load_recipe(path)


def test_a_folder_that_is_no_whole_cache_is_refused(recipe_of, eight, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(eight, begun)
    (begun / "manifest.json").unlink()
    cut = tmp_path / "cut"
    shutil.copytree(eight, cut)
    next((cut / "shards").glob("*.arrow")).write_bytes(b"cut")
    flipped = tmp_path / "flipped"
    shutil.copytree(eight, flipped)
    shard = flipped / "shards" / "000000.arrow"
    first = TargetFolder.open(eight).row(0).label_log_probabilities.astype("float16").tobytes()
    shard.write_bytes(shard.read_bytes().replace(first, bytes(len(first))))
    for folder, words in ((tmp_path / "none", "holds no teacher's distributions"),
                          (begun, "has not finished there"), (cut, r"\.arrow"),
                          (flipped, r"^the shard \S*000000\.arrow is damaged: the checksum of")):
        recipe = load_recipe(recipe_of({"cached": str(folder)}, "refused"))
        with pytest.raises(InputError, match=words):
            check_recipe(recipe, 1)


def test_all_that_is_wrong_with_a_cache_is_in_one_message(recipe_of, shared_model, drawn, tmp_path):
    """Another tokenizer, other rows, and losses of which draws do not tell enough."""
    student = shared_model("llama", 7, words=["one", "two", "three"])
    recipe = load_recipe(recipe_of({"cached": str(drawn)}, "refused", loss__alpha=-3.0),
                         [f"student.model={student}", f"data.prepared={tmp_path / 'data'}"])
    prepare_all(recipe.data, 12, load_tokenizer(str(student)), tmp_path / "data")
    with pytest.raises(InputError) as raised:
        check_recipe(recipe, 1)
    message = str(raised.value)
    assert "has another tokenizer than the student: it has" in message
    assert "it is of other data: of" in message
    assert "`loss`:" in message and "`data.train.0.loss`:" in message
    assert "teacher.model" in message


def test_a_loss_of_no_weight_is_refused_beside_one_that_reads_the_draws_and_nowhere_else(
        recipe_of, drawn):
    """In a step with a divergence every source has one, be it of weight 0."""
    recipe = recipe_of({"cached": str(drawn)}, "weights")
    own = "data.train.0.loss={lam: 0.5, kd_weight: 0, ce_weight: 1}"
    check = ["train.statistics=[]"]
    with pytest.raises(InputError, match=r"`data\.train\.0\.loss`: sampled weights for AMiD"):
        check_recipe(load_recipe(recipe, ["loss={order: rq, lam: 1}", own, *check]), 1)
    check_recipe(load_recipe(recipe, ["loss.kd_weight=0", own, *check]), 1)
    # No source is left that has it.
    all_own = "data.train.1.loss={preset: fkl}"
    check_recipe(load_recipe(recipe, [all_own.replace(".1.", ".0."), all_own, *check]), 1)


def test_rows_that_are_prepared_later_are_compared_before_the_engine_is_built(recipe_of, eight,
                                                                              tmp_path):
    recipe = recipe_of({"cached": str(eight)}, "late")
    run = Ranks(1, "train", recipe, f"data.prepared={tmp_path / 'other'}", "train.seq_length=20")
    assert run.wait() == [2]
    assert "it is of other data" in run.output()


def test_the_plan_has_no_teacher_but_its_targets(recipe_of, llama_pair, eight, drawn, capsys):
    plans = {}
    for name, teacher in (("live", {"model": str(llama_pair[1])}), ("topk", {"cached": str(eight)}),
                          ("sample", {"cached": str(drawn)})):
        loss = [] if name != "sample" else ["loss={preset: fkl}", "data.train.0.loss=null"]
        assert main(["plan", str(recipe_of(teacher, name)), "--json", *loss]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
    assert plans["live"]["memory_per_rank"]["teacher_weights"] > 0
    for name, kept in (("topk", 8 * 12 + 8), ("sample", 12 * 16 + 4)):
        plan = plans[name]
        assert plan["flops_per_step"]["teacher"] == 0
        assert plan["flops_per_step"]["student"] == plans["live"]["flops_per_step"]["student"]
        # 4 rows of 24 tokens.
        assert plan["memory_per_rank"]["teacher_targets"] == 96 * kept
        assert not {part for part in plan["memory_per_rank"] if part.startswith("teacher_")} - {
            "teacher_targets"}
        assert not any("teacher" in part and size for part, size
                       in plan["network_per_step"].items())


def scores(*arguments: object, capsys) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_has_the_teachers_part_from_a_cache_of_every_id(llama_pair, text_file, tmp_path,
                                                             capsys):
    student, teacher = llama_pair
    live = scores(student, "--teacher", teacher, "--data", text_file, "--seq-length", 24,
                  capsys=capsys)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", student, None, text_file, tmp_path))
    prepare_all(recipe.data, 24, load_tokenizer(str(student)), tmp_path / "data")
    vocabulary = len(AutoTokenizer.from_pretrained(teacher))
    caches = {k: write_cache(tmp_path / str(k), teacher, tmp_path / "data", k=k)
              for k in (4, vocabulary)}
    cached = scores(student, "--cached", caches[vocabulary], "--data", text_file, "--seq-length",
                    24, capsys=capsys)
    assert cached.keys() == live.keys() and cached["reverse_kl"] is None
    for name in ("loss", "perplexity", "kl_to_teacher", "top1_agreement", "calibration_error"):
        assert cached[name] == pytest.approx(live[name], rel=1e-5), name
    # A part of the ids, from the prepared folder itself: less than the whole divergence.
    part = scores(student, "--cached", caches[4], "--data", tmp_path / "data", capsys=capsys)
    assert part["loss"] == live["loss"] and part["top1_agreement"] == live["top1_agreement"]
    assert 0 < part["kl_to_teacher"] < live["kl_to_teacher"]
    cache = write_cache(tmp_path / "drawn", teacher, tmp_path / "data", draws=40)
    sampled = scores(student, "--cached", cache, "--data", tmp_path / "data", capsys=capsys)
    assert sampled["top1_agreement"] is None
    assert sampled["kl_to_teacher"] == pytest.approx(live["kl_to_teacher"], rel=0.1)


def test_the_divergence_from_draws_is_right_on_average():
    draw = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(3, 20, generator=draw).mul(2).log_softmax(-1) for _ in range(2))
    truth = (log_p.exp() * (log_p - log_q)).sum().item()
    found = []
    for _ in range(400):
        ids = torch.multinomial(log_p.exp(), 12, replacement=True, generator=draw)
        counts = torch.zeros(3, 20).scatter_add_(1, ids, torch.ones(3, 12))
        every = torch.arange(20).expand(3, 20)
        targets = SparseTargets(torch.where(counts > 0, every, -1), log_p, weights=counts / 12)
        found.append(kl_from(targets, log_q).item())
    values = torch.tensor(found)
    assert abs(values.mean() - truth) < 4 * values.std() / 20 < 0.1 * truth


@pytest.mark.parametrize("arguments, words", [
    (["--seq-length", "20"], "is of others"), (["--teacher", "x"], "one teacher"),
    (["--data", "PREPARED", "--seq-length", "20"], "whose rows are prepared"),
    (["--data", "PREPARED", "--text", "words"], "whose rows are prepared")])
def test_eval_refuses_a_cache_of_other_rows_and_what_cannot_go_together(
        llama_pair, text_file, prepared, eight, capsys, arguments, words):
    arguments = [str(prepared) if each == "PREPARED" else each for each in arguments]
    assert main(["eval", str(llama_pair[0]), "--cached", str(eight), "--data", str(text_file),
                 *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_goes_on_to_the_last_digit_on_other_ranks_too_and_with_no_other_cache(
        recipe_of, eight, drawn, tmp_path):
    """The folder may have moved."""
    recipe = recipe_of({"cached": str(eight)}, "run", checkpoint__every=3)
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000006"
    run_ranks(2, "train", recipe)
    whole = comparable_metrics(run)
    moved = tmp_path / "moved"
    shutil.copytree(eight, moved)
    shutil.rmtree(last)
    run_ranks(2, "train", recipe, f"teacher.cached={moved}")
    assert comparable_metrics(run) == whole
    shutil.rmtree(last)
    run_ranks(1, "train", recipe)
    for line, expected in zip(comparable_metrics(run), whole, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    shutil.rmtree(last)
    other = Ranks(1, "train", recipe, f"teacher.cached={drawn}", "loss={preset: fkl}",
                  "data.train.0.loss=null", "train.statistics=[]",
                  "checkpoint.allow_change=[loss, data.train]")
    assert other.wait() == [2]
    assert "teacher.cache_sha256" in other.output()
    assert "teacher.sha256" not in other.output()


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["eight", "drawn"])
def test_a_student_learns_from_a_cache_over_epochs(recipe_of, kept, request, tmp_path):
    recipe = recipe_of({"cached": str(request.getfixturevalue(kept))}, "epochs")
    run_ranks(1, "train", recipe, "loss={preset: fkl}", "data.train.0.loss=null",
              "train.steps=null", "train.epochs=4", "train.learning_rate=0.01",
              "train.statistics=[]")
    divergences = [line["kd_loss"] for line in comparable_metrics(tmp_path / "epochs")]
    quarter = len(divergences) // 4
    first, last = (sum(part) / quarter for part in (divergences[:quarter], divergences[-quarter:]))
    assert last < 0.7 * first


@pytest.mark.slow
def test_draws_train_with_an_auxiliary_corpus_and_tell_their_statistics(recipe_of, drawn, text_file,
                                                                       tmp_path):
    recipe = recipe_of({"cached": str(drawn)}, "draws")
    run_ranks(2, "train", recipe, "loss={preset: fkl}", "data.train.0.loss=null",
              f"data.auxiliary={{path: {text_file}}}",
              "train.statistics=[label_probability, teacher_entropy]",
              f"data.eval=[{{path: {text_file}, name: held, text: text}}]",
              f"data.prepared={tmp_path / 'data'}")
    for line in comparable_metrics(tmp_path / "draws"):
        assert line["kd_loss"] > 0 and line["auxiliary_loss"] > 0
        assert 0 < line["label_probability"] < 1 and line["teacher_entropy"] > 0
        assert line["loss"] == pytest.approx(line["kd_loss"] + line["auxiliary_loss"], rel=1e-6)
    evaluation = json.loads((tmp_path / "draws" / "eval.jsonl").read_text().splitlines()[-1])
    assert evaluation["loss"] > 0 and evaluation["kl_to_teacher"] is None
