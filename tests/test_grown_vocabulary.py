"""A student whose vocabulary has grown by tokens that its teacher does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.data import write_jsonl
from support.losses import EVERY_DIVERGENCE, OBJECTIVES, PER_TOKEN, LossProblem
from support.models import WORDS, make_sentencepiece, make_tokenizer
from support.ranks import run_ranks
from support.reference_loop import DocumentLosses, reference_loop
from support.runs import read_metrics, write_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from amid_ds import AMiD, LMHead, PerToken, linear_amid_loss
from amid_ds.checkpoint.manifest import Manifest
from amid_ds.config.parse import load_recipe
from amid_ds.data import load_tokenizer
from amid_ds.data.batch import TokenRow, collate_rows
from amid_ds.data.grown import GrownVocabulary, grown_vocabulary
from amid_ds.errors import InputError
from amid_ds.losses import FirstPieces, grown_amid_loss
from amid_ds.losses.reference import naive_loss, naive_values
from amid_ds.training.job import check_recipe

# Of the ids 36 to 40; three begin with the same piece.
FIRST_PIECES = torch.tensor([3, 17, 3, 35, 3])
OLD = 36
FOLDABLE = [each for each in PER_TOKEN if not each.needs_sequences]


def naive_grown(problem: LossProblem, objective: AMiD, kd_weight: float, ce_weight: float,
                softcap: float | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kd [N], ce [N]) from all logits."""
    z = problem.student @ problem.weight[:41].T + problem.bias[:41]
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = objective.student_temperature
    q = (z / tau).softmax(-1)
    folded = [q[:, i] + sum(q[:, OLD + j] for j, piece in enumerate(FIRST_PIECES.tolist())
                            if piece == i) for i in range(OLD)]
    # naive_loss divides by the temperature again.
    student = torch.stack(folded, 1).log() * tau
    teacher = problem.teacher @ problem.teacher_weight[:OLD].T
    labels = torch.tensor([FIRST_PIECES[i - OLD] if i >= OLD else i
                           for i in problem.labels.tolist()])
    kd = naive_loss(student, teacher, objective, labels)
    ce = F.cross_entropy(z, problem.labels, reduction="none", ignore_index=-100)
    ce = torch.where(torch.isin(labels, FIRST_PIECES), ce, 0.0)
    weights = problem.weights
    if objective.token_weight is not None:
        values = naive_values(student, teacher, objective, labels)[objective.token_weight]
        weights = weights * torch.tensor(values, dtype=kd.dtype)
    counted = problem.weights > 0
    return ((weights * (kd_weight * kd + ce_weight * ce))[counted].sum(),
            torch.where(counted, kd, 0.0), torch.where(counted, ce, 0.0))


def grown(problem: LossProblem, objective: AMiD, kd_weight: float, ce_weight: float, **options):
    head = LMHead(problem.weight, problem.bias, options.pop("softcap", None),
                  options.pop("scale", 1.0))
    return grown_amid_loss(
        problem.student, head, problem.teacher, problem.teacher_weight, objective,
        FirstPieces.of(FIRST_PIECES), token_weights=problem.weights, labels=problem.labels,
        vocab_size=41, kd_weight=kd_weight, ce_weight=ce_weight, **options)


def problem_with_new_labels() -> LossProblem:
    problem = LossProblem(padding=-5)
    problem.labels[1:9] = torch.tensor([36, 3, -100, 40, 39, 2, 17, 35])
    return problem


@pytest.mark.parametrize("objective", [*OBJECTIVES, *FOLDABLE, *(
    AMiD(0.5, 0.3, divergence, "qr", temperature=1.7) for divergence in EVERY_DIVERGENCE)],
    ids=str)
@pytest.mark.parametrize("workspace", [None, 3000])
def test_the_loss_and_its_gradient_are_the_naive_ones(objective, workspace):
    problem = problem_with_new_labels()
    options = {"softcap": 5.0, "scale": 0.7} if workspace else {}
    loss, kd, ce = naive_grown(problem, objective, 0.8, 0.6, **options)
    truth = torch.autograd.grad(loss, problem.leaves(), allow_unused=True)
    out = grown(problem, objective, 0.8, 0.6, workspace_bytes=workspace, **options)
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(out.kd, kd)
    torch.testing.assert_close(out.ce, ce)
    assert (ce > 0).sum() >= 3
    for ours, theirs in zip(torch.autograd.grad(out.loss, problem.leaves()), truth, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kd_weight, ce_weight", [(1.0, 0.0), (0.0, 1.0)])
def test_each_part_alone_has_its_own_gradient(kd_weight, ce_weight):
    problem = problem_with_new_labels()
    loss, *_ = naive_grown(problem, OBJECTIVES[0], kd_weight, ce_weight)
    truth = torch.autograd.grad(loss, problem.leaves())
    out = grown(problem, OBJECTIVES[0], kd_weight, ce_weight)
    for ours, theirs in zip(torch.autograd.grad(out.loss, problem.leaves()), truth, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tokens_without_a_new_piece_anywhere_are_the_ordinary_loss():
    problem = problem_with_new_labels()
    with torch.no_grad():
        problem.bias[OLD:] = -torch.inf
    problem.labels[:] = -100
    out = grown(problem, OBJECTIVES[1], 1.0, 0.0)
    ordinary = linear_amid_loss(
        problem.student, LMHead(problem.weight, problem.bias), problem.teacher,
        problem.teacher_weight, OBJECTIVES[1], token_weights=problem.weights, vocab_size=OLD)
    torch.testing.assert_close(out.kd, ordinary.kd)
    for ours, theirs in zip(torch.autograd.grad(out.loss, problem.leaves()),
                            torch.autograd.grad(ordinary.loss, problem.leaves()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precisions_and_kernels_follow_the_float64_truth(backend, dtype):
    exact = problem_with_new_labels()
    problem = exact.to(dtype)
    exact = problem.to(torch.float64)
    loss, *_ = naive_grown(exact, OBJECTIVES[0], 1.0, 0.5)
    truth = torch.autograd.grad(loss, exact.leaves())
    out = grown(problem, OBJECTIVES[0], 1.0, 0.5, backend=backend)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(out.loss, problem.leaves()), truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_a_nan_stays_one_and_an_impossible_group_has_no_share():
    problem = problem_with_new_labels()
    with torch.no_grad():
        # No member of the first piece 17 has any probability.
        problem.bias[[17, 37]] = -torch.inf
    out = grown(problem, AMiD(lam=0.3, order="qr"), 1.0, 0.0)
    assert out.loss.isfinite()
    assert all(each.isfinite().all() for each in torch.autograd.grad(out.loss, problem.leaves()))
    with torch.no_grad():
        problem.student[1] = torch.nan
    assert grown(problem, OBJECTIVES[0], 1.0, 0.5).loss.isnan()


@pytest.mark.parametrize("changes, found", [
    ({"objective": AMiD(token_weight=PerToken("teacher_entropy", top=0.5))}, "whole sequences"),
    ({"first_pieces": FIRST_PIECES.int()}, "first pieces .5. of torch.int32"),
    ({"first_pieces": FIRST_PIECES[:0]}, "first pieces .0."),
    ({"first_pieces": FIRST_PIECES + 1}, "first pieces from 4 to 36"),
    ({"first_pieces": FIRST_PIECES - 4}, "first pieces from -1 to 31"),
    ({"vocab_size": 45}, "student_head with 42 rows"),
    ({"vocab_size": 5}, "5 first pieces"),
])
def test_what_cannot_be_folded_is_refused_by_name(changes, found):
    problem = problem_with_new_labels()
    call = {"objective": OBJECTIVES[0], "first_pieces": FIRST_PIECES, "vocab_size": 41, **changes}
    problem.labels[:] = -100
    with pytest.raises(InputError, match=found):
        call["first_pieces"] = FirstPieces.of(call["first_pieces"])
        grown_amid_loss(problem.student, problem.weight, problem.teacher, problem.teacher_weight,
                        token_weights=problem.weights, labels=problem.labels, **call)


NEW_TOKENS = ["river sings", "under the", "two stone"]


@pytest.fixture(scope="module")
def grown_student(shared_model, tmp_path_factory) -> Path:
    """The teacher with three tokens of several words more, each with the mean of its pieces' rows.
    """
    folder = tmp_path_factory.mktemp("grown")
    model = AutoModelForCausalLM.from_pretrained(shared_model("llama", 1))
    tokenizer = AutoTokenizer.from_pretrained(shared_model("llama", 1))
    pieces = [tokenizer(token)["input_ids"] for token in NEW_TOKENS]
    assert tokenizer.add_tokens(NEW_TOKENS) == 3
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for number, ids in enumerate(pieces):
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[len(tokenizer) - 3 + number] = table.weight[ids].mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    texts = [" ".join((["the bird", "river sings", "slowly", "under the", "old tree", "two stone",
                        "the river runs", "two light"] * 2)[i % 5:i % 5 + 3 + i % 6])
             for i in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl",
                       [{"text": text} for text in texts])


@pytest.fixture
def recipe_for(grown_student, shared_model, rows, tmp_path):
    def write(name: str, **changes) -> Path:
        settings = {"teacher__vocabulary": "grown", "data__prepared": str(tmp_path / "data"),
                    "data__eval": [{"name": "all", "path": str(rows), "text": "text"}], **changes}
        return write_recipe(tmp_path / f"{name}.yaml", grown_student, shared_model("llama", 1),
                            rows, tmp_path / name, **settings)
    return write


def folded_losses(teacher: Path) -> DocumentLosses:
    """The losses in plain torch, the teacher on the text's old words."""
    words = AutoTokenizer.from_pretrained(teacher)
    old, pieces = len(words), [words(token)["input_ids"] for token in NEW_TOKENS]
    first = torch.tensor([ids[0] for ids in pieces])

    def of_document(log_q, ids, keep, labels, guide, lam):
        spelt, last = [], []
        for token in ids[0].tolist():
            spelt += pieces[token - old] if token >= old else [token]
            last.append(len(spelt) - 1)
        with torch.no_grad():
            p = guide(torch.tensor([spelt]))[0, last][keep, :old].double().softmax(-1)
        q = log_q.exp()
        folded = q[:, :old].clone()
        for number, piece in enumerate(first.tolist()):
            folded[:, piece] = folded[:, piece] + q[:, old + number]
        r = lam * p + (1 - lam) * folded
        blind = (labels >= old) | torch.isin(labels, first)
        return ((p * (p.log() - r.log())).sum(),
                F.nll_loss(log_q[blind], labels[blind], reduction="sum"))
    return of_document


@pytest.mark.parametrize("isolated", [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_with_new_tokens_is_a_plain_loops_and_learns(isolated, recipe_for, grown_student,
                                                           shared_model, tmp_path):
    recipe = recipe_for("run1", data__isolate_documents=isolated, train__eval_every=3)
    run_ranks(1, "train", recipe)
    truth = None
    for ranks in (1, 2) if isolated else (1,):
        if ranks == 2:
            run_ranks(2, "train", recipe, f"output_dir={tmp_path / 'run2'}")
        got = read_metrics(tmp_path / f"run{ranks}")
        if isolated:
            teacher = shared_model("llama", 1)
            truth = truth or reference_loop(
                grown_student, teacher, yaml.safe_load(recipe.read_text()), tmp_path / "data",
                of_document=folded_losses(teacher))[0]
            for expected, line in zip(truth, got, strict=True):
                for name, value in expected.items():
                    assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        else:
            # A resumed run whose new tokens are spelt otherwise is another one.
            checkpoint = tmp_path / "run1" / "checkpoints" / "step_00000006"
            assert Manifest.read(checkpoint).identity["teacher.pieces_sha256"] == GrownVocabulary(
                31, ((7, 14), (19, 3), (6, 8))).sha256
        first, last = [json.loads(line) for line in
                       (tmp_path / f"run{ranks}" / "eval.jsonl").read_text().splitlines()]
        assert last["loss"] < first["loss"]
        assert last["kl_to_teacher"] > 0 and 0 < last["top1_agreement"] <= 1


def test_the_teachers_rows_spell_the_students_and_end_where_they_do():
    vocabulary = GrownVocabulary(10, ((1, 2), (3,), (4, 5, 6)))
    rows = [TokenRow(np.array([0, 10, 7, 12, 8, 11]), np.array([1, 6]), np.array([3]), "a"),
            TokenRow(np.array([9, 12, 1]), np.array([2, 3]), np.array([]), "b")]
    batch = collate_rows(rows, [0, 1])
    own = vocabulary.with_teachers_rows([batch])[0].for_teacher
    assert own.input_ids.tolist() == [[0, 1, 2, 7, 4, 5, 6, 8], [9, 4, 5, 6, 0, 0, 0, 0]]
    # Behind 0, [1, 2], 7, [4, 5, 6], 8; behind [4, 5, 6] of the second row.
    assert own.valid.tolist() == [0, 2, 3, 6, 7, 8 + 3]
    assert own.targets.tolist() == batch.targets.tolist() == [10, 7, 12, 8, 11, 1]
    assert own.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert own.documents.starts == ((0, 4, 8), (0, 4))
    assert (batch.padding, own.padding) == (3, 4)
    # Of these rows each text has 4 tokens; without positions of its own a row is one.
    limited = [GrownVocabulary(10, vocabulary.pieces, limit=limit) for limit in (3, 4, 7, 8)]
    one_text = replace(batch, positions=None, documents=None)
    for each, own_batch in ((limited[1], batch), (limited[3], one_text)):
        assert each.expand(own_batch).input_ids.tolist() == own.input_ids.tolist()
    for each, own_batch, count in ((limited[0], batch, 4), (limited[2], one_text, 8)):
        with pytest.raises(InputError, match=f"a: {count} of the teacher's tokens in one text, and "
                                             f"the teacher has {each.limit} positions"):
            each.expand(own_batch)


def test_pieces_are_the_old_tokenizers_of_any_kind(grown_student, shared_model, tmp_path):
    vocabulary = grown_vocabulary(load_tokenizer(str(grown_student)),
                                  load_tokenizer(str(shared_model("llama", 1))), "a", "b")
    words = ["<unk>", "<eos>", "<pad>", *WORDS]
    assert vocabulary.old == len(words)
    assert [" ".join(words[i] for i in pieces) for pieces in vocabulary.pieces] == NEW_TOKENS
    assert [words[i] for i in vocabulary.first_pieces] == ["river", "under", "two"]
    folder = make_sentencepiece(tmp_path / "pieces")
    old, new = (load_tokenizer(str(folder)) for _ in range(2))
    new.add_tokens(["number 7", "\tindented"])
    pieces = grown_vocabulary(new, old, "a", "b").pieces
    assert [old.decode(list(ids)) for ids in pieces] == ["number 7", "\tindented"]


def test_pieces_have_no_space_that_the_tokenizer_puts_before_a_text(tmp_path):
    """As Llama 2's does: a new token that is found within a word begins without one."""
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), *(
        (letter, -3.0) for letter in "abcdefgh")], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path)
    old, new = (load_tokenizer(str(tmp_path)) for _ in range(2))
    new.add_tokens(["bad", " cab"])
    vocabulary = grown_vocabulary(new, old, "a", "b")
    assert [old.convert_ids_to_tokens(list(ids)) for ids in vocabulary.pieces] == [
        list("bad"), list("▁cab")]
    new.add_tokens(["x"])
    with pytest.raises(InputError, match="the id 12 is 'x', which the teacher's"):
        grown_vocabulary(new, old, "a", "b")


def changed(grown_student: Path, shared_model, change: str) -> tuple:
    student = load_tokenizer(str(grown_student))
    teacher = load_tokenizer(str(shared_model("llama", 1)))
    if change == "unspelt":
        student.add_tokens(["unheardof"])
    if change == "swapped":
        swapped = make_tokenizer(grown_student.parent / "swapped", [WORDS[1], WORDS[0], *WORDS[2:]])
        swapped.add_tokens(["river sings"])
        student = swapped
    if change == "same":
        student = teacher
    return student, teacher


@pytest.mark.parametrize("change, found", [
    ("unspelt", "the id 34 is 'unheardof', which the teacher's tokenizer cannot spell"),
    ("swapped", "the id 3 is 'a', of the teacher 'the'\n    the id 4 is 'the', of the teacher 'a'"),
    ("same", "no token is new")])
def test_a_tokenizer_that_is_no_extension_is_refused_with_its_ids(change, found, grown_student,
                                                                  shared_model):
    student, teacher = changed(grown_student, shared_model, change)
    with pytest.raises(InputError, match=found):
        grown_vocabulary(student, teacher, "a", "b")


@pytest.mark.parametrize("changes, found", [
    (["teacher.vocabulary=same"], "differ: "),
    (["teacher.vocabulary=old"], "teacher.vocabulary"),
    (["tensor_parallel=2"], "heads are cut alike"),
    (["rollout={max_new_tokens: 2}"], "`rollout`"),
    (["teacher.delta={base: {model: x}}"], "`teacher.delta`"),
    (["loss.token_weight={by: teacher_entropy, top: 0.5}"], "whole sequences"),
])
def test_recipes_that_cannot_have_a_grown_vocabulary_are_refused(changes, found, recipe_for):
    with pytest.raises(InputError, match=found):
        check_recipe(load_recipe(recipe_for("run"), changes), 2)
