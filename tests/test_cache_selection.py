"""The most probable ids of a teacher and draws from it, in blocks and over a cut vocabulary."""

import numpy as np
import pytest
import torch
from support.ranks import RankPool

from amid_ds import LMHead, VocabShard
from amid_ds.errors import InputError
from amid_ds.losses.selection import linear_draws, linear_topk, row_uniforms

VOCABULARY, PADDING, WIDTH = 41, 1, 6
SPLITS = {"even": [0, 21, 42], "uneven": [0, 5, 42], "an empty shard": [0, 20, 20, 42],
          "four, the last one padding": [0, 1, 17, 41, 42]}


@pytest.fixture(scope="module")
def ranks():
    ranks = RankPool()
    yield ranks
    ranks.close()


def problem(tokens=9, dtype=torch.float32, rows=VOCABULARY + PADDING):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    weight = torch.randn(rows, WIDTH, generator=generator)
    bias = torch.randn(rows, generator=generator)
    # An id that is never said.
    bias[7] = -torch.inf
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return [x.to(dtype) for x in (hidden, weight, bias)], labels


def naive_log_p(hidden, weight, bias, scale=1.0, cap=None, vocabulary=VOCABULARY):
    """log softmax in float64, from the rounded logits that the model's dtype has."""
    logits = torch.addmm(bias, hidden, weight.t()).double()[:, :vocabulary] * scale
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return logits - logits.exp().sum(-1, keepdim=True).log()


def naive_topk(log_p, labels, k):
    ids = [sorted(range(log_p.shape[1]), key=lambda x, row=row: (-row[x], x))[:k]
           for row in log_p.tolist()]
    rest = [np.log(sum(np.exp(value) for x, value in enumerate(row) if x not in own) or 0.0)
            if k < len(row) else -np.inf for row, own in zip(log_p.tolist(), ids, strict=True)]
    return torch.tensor(ids), torch.tensor(rest), log_p[torch.arange(len(log_p)), labels]


def selected(rank, group, cuts, kind, size, block_bytes=None, cap=None, dtype=torch.float32):
    (hidden, weight, bias), labels = problem(dtype=dtype)
    start, stop = cuts[rank], cuts[rank + 1]
    shard = None if group is None else VocabShard(start, stop, group)
    head = LMHead(weight[start:stop], bias[start:stop], cap, 0.8)
    common = {"labels": labels, "vocab_size": VOCABULARY, "shard": shard,
              "workspace_bytes": block_bytes}
    if kind == "topk":
        return linear_topk(hidden, head, size, **common)
    uniforms = torch.from_numpy(row_uniforms(0, 0, len(hidden), size))
    return linear_draws(hidden, head, uniforms, exponent=0.7, **common)


WHOLE = [0, VOCABULARY + PADDING]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_the_k_most_probable_ids_and_the_rest_are_those_of_a_full_softmax(k, cap):
    (hidden, weight, bias), labels = problem()
    log_p = naive_log_p(hidden, weight, bias, 0.8, cap)
    ids, rest, label = naive_topk(log_p, labels, k)
    top = selected(0, None, WHOLE, "topk", k, cap=cap)
    assert top.ids.tolist() == ids.tolist()
    assert top.log_p.dtype == top.log_rest.dtype == torch.float32
    expected = log_p.gather(1, ids).float()
    torch.testing.assert_close(top.log_p, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(top.log_rest, rest.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(top.label_log_p, label.float(), rtol=2e-6, atol=2e-6)
    # The rest is itself summed: where next to nothing is left it still has its digits.
    assert (top.log_rest < 0).all()


def test_among_equals_the_lowest_ids_are_taken_and_first():
    hidden = torch.ones(2, 1)
    weight = torch.tensor([1.0, 3.0, 2.0, 3.0, -0.0, 2.0, 0.0, 2.0, 3.0])[:, None]
    head, labels = LMHead(weight), torch.zeros(2, dtype=torch.int64)
    for k, expected in ((2, [1, 3]), (4, [1, 3, 8, 2]), (5, [1, 3, 8, 2, 5]),
                        (8, [1, 3, 8, 2, 5, 7, 0, 4])):
        assert linear_topk(hidden, head, k, labels=labels).ids.tolist() == [expected] * 2


def test_low_precision_takes_the_lowest_ids_among_its_many_equals():
    (hidden, weight, bias), labels = problem(dtype=torch.bfloat16)
    ids, _, _ = naive_topk(naive_log_p(hidden, weight, bias, 0.8), labels, 12)
    assert selected(0, None, WHOLE, "topk", 12, dtype=torch.bfloat16).ids.tolist() == ids.tolist()


def naive_draws(log_p, uniforms, exponent):
    """By token: {id: how often it is drawn}."""
    found = []
    for row, places in zip(log_p.double().tolist(), uniforms.tolist(), strict=True):
        sums = np.cumsum([np.exp(exponent * value) for value in row])
        drawn = [next(x for x, end in enumerate(sums) if end > place * sums[-1])
                 for place in places]
        found.append({x: drawn.count(x) for x in drawn})
    return found


def test_draws_are_those_of_the_inverse_of_the_distribution_function():
    (hidden, weight, bias), labels = problem()
    log_p = naive_log_p(hidden, weight, bias, 0.8)
    uniforms = torch.from_numpy(row_uniforms(0, 0, len(hidden), 20))
    draws = selected(0, None, WHOLE, "sample", 20)
    for row, expected in enumerate(naive_draws(log_p, uniforms, 0.7)):
        count = len(expected)
        assert draws.ids[row, :count].tolist() == sorted(expected)
        assert draws.counts[row, :count].tolist() == [expected[x] for x in sorted(expected)]
        assert (draws.ids[row, count:] == -1).all() and (draws.counts[row, count:] == 0).all()
        assert draws.log_p[row, count:].isneginf().all()
        torch.testing.assert_close(draws.log_p[row, :count], log_p[row, sorted(expected)].float(),
                                   rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(draws.log_proposal_sum, (0.7 * log_p).logsumexp(-1).float(),
                               rtol=2e-6, atol=2e-6)
    label = log_p[torch.arange(len(log_p)), labels]
    torch.testing.assert_close(draws.label_log_p, label.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("exponent", [1.0, 0.6])
def test_the_mean_weight_of_an_id_is_its_probability(exponent):
    (hidden, weight, bias), labels = problem(tokens=2)
    log_p = naive_log_p(hidden, weight, bias)
    draws, many = 50, 4000
    uniforms = torch.from_numpy(row_uniforms(1, 2, 2 * many, draws))
    out = linear_draws(hidden.repeat(many, 1), LMHead(weight, bias), uniforms, exponent=exponent,
                       labels=labels.repeat(many), vocab_size=VOCABULARY)
    ratio = ((1 - exponent) * out.log_p.double() + out.log_proposal_sum.double()[:, None]).exp()
    weights = torch.where(out.ids >= 0, out.counts / draws * ratio, 0.0)
    dense = torch.zeros(2 * many, VOCABULARY, dtype=torch.float64).scatter_add_(
        1, out.ids.clamp(min=0), weights)
    samples = dense.view(many, 2, VOCABULARY)
    p = log_p.exp()
    proposal = p**exponent / (p**exponent).sum(-1, keepdim=True)
    ratio = torch.where(p > 0, p / proposal, 0)
    deviation = (p / many / draws * (ratio - p).clamp(min=0)).sqrt()
    # Of what is hardly ever drawn, a few draws more or less.
    few = 10 / many / draws * ratio
    assert ((samples.mean(0) - p).abs() <= 5 * deviation + few).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("kind", "size"), [("topk", 7), ("topk", VOCABULARY), ("sample", 12)])
def test_every_split_of_the_vocabulary_selects_what_one_process_selects(kind, size, split, ranks):
    whole = selected(0, None, WHOLE, kind, size)
    cuts = SPLITS[split]
    results = ranks.run(len(cuts) - 1, selected, cuts, kind, size, 2000)
    for actual, expected in zip(results[0], whole, strict=True):
        if expected.dtype == torch.int64:
            assert actual.tolist() == expected.tolist()
        else:
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("kind", ["topk", "sample"])
def test_logits_exist_for_a_block_of_tokens_at_a_time(kind, monkeypatch):
    whole, blocks = selected(0, None, WHOLE, kind, 5), []
    real = LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda head, hidden, *rest: (
        blocks.append(len(hidden)), real(head, hidden, *rest))[1])
    parts = selected(0, None, WHOLE, kind, 5, block_bytes=2000)
    assert max(blocks) == 1 and sum(blocks) == 9
    for actual, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_rows_numbers_are_its_own_whatever_is_drawn_elsewhere():
    first = row_uniforms(5, 11, 4, 3)
    assert (row_uniforms(5, 11, 6, 3)[:4] == first).all()
    assert not (row_uniforms(5, 12, 4, 3) == first).any()
    assert not (row_uniforms(6, 11, 4, 3) == first).any()


def test_more_ids_than_the_vocabulary_has_are_refused():
    with pytest.raises(InputError, match="k=42 of a vocabulary of 41"):
        selected(0, None, WHOLE, "topk", 42)


def test_no_tokens_select_nothing():
    (hidden, weight, bias), labels = problem()
    top = linear_topk(hidden[:0], LMHead(weight, bias), 3, labels=labels[:0])
    assert top.ids.shape == (0, 3) and top.log_rest.shape == (0,)
