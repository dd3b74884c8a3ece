"""What is learnt from the student's own words: by the rollouts' loss, or from sampled tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.data import split_documents
from support.models import WORDS
from support.ranks import rank_main, run_ranks
from support.runs import comparable_metrics, read_metrics, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.training.rollout import Rollouts

VOCABULARY = len(WORDS) + 3


def keeping_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that keeps each step's sampled micro-batches in a file beside its log."""
    original, kept = Rollouts.batch_for_step, []

    def keeping(self, data):
        made = original(self, data)
        kept.append([document for batch in made.window for document in split_documents(batch)])
        torch.save(kept, f"{log}.batches")
        return made

    Rollouts.batch_for_step = keeping
    rank_main(argv, variables, log)


LAYOUTS = {"one rank": (1, []), "two ranks": (2, []), "tp 2": (2, ["tensor_parallel=2"])}


@pytest.mark.parametrize("layout", ["one rank", *(pytest.param(name, marks=pytest.mark.slow)
                                                  for name in ("two ranks", "tp 2"))])
@pytest.mark.parametrize("baseline", ["kl", pytest.param("none", marks=pytest.mark.slow)])
def test_a_step_on_sampled_tokens_follows_their_policy_gradient(
        layout, baseline, shared_model, instructions_file, tmp_path):
    size, overrides = LAYOUTS[layout]
    pair = shared_model("llama-tied", 0), shared_model("gpt2", 1)
    recipe = write_recipe(
        tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run", train__steps=1,
        train__seq_length=40, train__gradient_clipping=0.0, train__warmup_steps=0,
        loss={"lam": 0.3, "ce_weight": 0.5, "normalise": "sequence",
              "temperature": {"student": 1.5, "teacher": 1.0}},
        rollout={"share": 1.0, "max_new_tokens": 12, "temperature": 1.5, "estimator": "sampled",
                 "loss": {"baseline": baseline}})
    ranks = run_ranks(size, "train", recipe, *overrides, target=keeping_rank)
    # Tensor-parallel peers have the same ones.
    of_ranks = [torch.load(f"{ranks.log(rank)}.batches")[0]
                for rank in range(1 if overrides else size)]
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).double() for path in pair)
    means, surrogates = [], []
    for ids, labels in itertools.chain.from_iterable(of_ranks):
        keep = labels != -100
        if not keep.any():
            continue
        log_q = (student(ids).logits[0, keep, :VOCABULARY] / 1.5).log_softmax(-1)
        log_p = teacher(ids).logits[0, keep, :VOCABULARY].log_softmax(-1).detach()
        said = [log.gather(1, labels[keep][:, None])[:, 0] for log in (log_q, log_p)]
        mean = (log_q.exp() * (log_q - log_p)).sum(-1)
        advantage = (said[0] - said[1] - mean * (baseline == "kl")).detach()
        surrogates.append((advantage * said[0]).mean())
        means.append((said[0] - said[1]).mean().item())
    torch.stack(surrogates).mean().backward()
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm().item()
    line = read_metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


# Of every step's rows the student writes the responses: greedily, as that is fast to follow.
OWN_WORDS = {"share": 1.0, "temperature": 0, "max_new_tokens": 8}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_students_own_words_are_learnt_by_the_rollouts_loss_alone(
        ranks, shared_model, instructions_file, tmp_path):
    pair = shared_model("llama-tied", 0), shared_model("gpt2", 1)

    def metrics(name: str, loss: dict, own: dict | None = None) -> list[dict]:
        recipe = write_recipe(tmp_path / f"{name}.yaml", *pair, instructions_file, tmp_path / name,
                              data__prepared=str(tmp_path / "data"), train__steps=2,
                              train__micro_batch_size=2, loss={**loss, "normalise": "sequence"},
                              rollout={**OWN_WORDS, "loss": own})
        run_ranks(ranks, "train", recipe)
        return comparable_metrics(tmp_path / name)

    wanted = metrics("wanted", {"lam": 0.6, "order": "qr"})
    got = metrics("got", {"lam": 0.3, "ce_weight": 0.5}, {"lam": 0.6, "order": "qr"})
    same = ("loss", "kd_loss", "ce_loss", "grad_norm", "tokens", "rollout")
    assert [[line[key] for key in same] for line in got] == [
        [line[key] for key in same] for line in wanted]
    both = metrics("both", {"lam": 0.3}, {"ce_weight": 0.5})[0]
    assert both["loss"] == pytest.approx(both["kd_loss"] + 0.5 * both["ce_loss"], rel=1e-5)
