"""The order of the samples: each row once per epoch, shares by weight, a function of the number."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amid_ds.data.order import deal, dealt, permute, rows_of


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permute_is_a_bijection(size, key):
    out = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(out.tolist()) == list(range(size))


def test_permute_depends_on_its_key_and_leaves_little_in_place():
    size = 10_000
    one, two = (permute(np.arange(size), size, np.full(size, key, np.uint64)) for key in (1, 2))
    for out in (one, two):
        # A random permutation leaves one index where it was,
        assert np.sum(out == np.arange(size)) < 10
        # and one pair of neighbours together.
        assert np.sum(np.diff(out) == 1) < 10
    assert np.sum(one == two) < 10


def test_permute_works_near_the_largest_corpora():
    indices, size = np.arange(100), 10**12 + 39
    out = permute(indices, size, np.full(100, 7, np.uint64))
    assert len(set(out.tolist())) == 100 and out.min() >= 0 and out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.15


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10**12))
@settings(deadline=None)
def test_deal_counts_each_sources_samples_without_gaps(weights, first):
    """Whatever the start, the numbers that a source hands out go up by one."""
    last = {}
    for source, number in deal(range(first, first + 300), weights):
        assert number == last.get(source, number - 1) + 1
        last[source] = number


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6), st.integers(1, 3000))
@settings(deadline=None)
def test_deal_keeps_to_the_weights_at_every_moment(weights, samples):
    counts = Counter(source for source, _ in deal(range(samples), weights))
    assert [counts[source] for source in range(len(weights))] == dealt(samples, weights)
    for source, weight in enumerate(weights):
        assert abs(counts[source] - samples * weight / sum(weights)) <= len(weights)


def test_every_epoch_of_every_source_reads_each_row_once():
    # Four epochs of either source.
    rows = rows_of(range(400), [30, 70], [3.0, 7.0], seed=5)
    for epoch in range(4):
        assert sorted(rows[100 * epoch:100 * epoch + 100].tolist()) == list(range(100))
    assert not np.array_equal(rows[:100], rows[100:200])


@pytest.mark.parametrize("cut", [1, 17, 399])
def test_rows_do_not_depend_on_what_was_asked_for_before(cut):
    counts, weights = [30, 50, 1], [1.0, 2.5, 0.1]
    whole = rows_of(range(400), counts, weights, seed=1)
    parts = np.concatenate([rows_of(range(cut), counts, weights, 1),
                            rows_of(range(cut, 400), counts, weights, 1)])
    assert np.array_equal(whole, parts)
    assert not np.array_equal(whole, rows_of(range(400), counts, weights, seed=2))
