"""The order of the samples: each row once per epoch, shares by weight, a function of the number."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amid_ds.config.schedule import SPLITMIX64_GAMMA, splitmix64, step_seed
from amid_ds.data.order import assign_source, permute_indices, rows_for_samples, samples_per_source


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permute_is_a_bijection(size, key):
    out = permute_indices(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(out.tolist()) == list(range(size))


def test_permute_depends_on_its_key_and_leaves_little_in_place():
    size = 10_000
    one, two = (permute_indices(np.arange(size), size, np.full(size, key, np.uint64))
                for key in (1, 2))
    for out in (one, two):
        # A random permutation leaves one index where it was,
        assert np.sum(out == np.arange(size)) < 10
        # and one pair of neighbours together.
        assert np.sum(np.diff(out) == 1) < 10
    assert np.sum(one == two) < 10


def test_permute_works_near_the_largest_corpora():
    indices, size = np.arange(100), 10**12 + 39
    out = permute_indices(indices, size, np.full(100, 7, np.uint64))
    assert len(set(out.tolist())) == 100 and out.min() >= 0 and out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.15


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10**12))
@settings(deadline=None)
def test_deal_counts_each_sources_samples_without_gaps(weights, first):
    """Whatever the start, the numbers that a source hands out go up by one."""
    last = {}
    for source, number in assign_source(range(first, first + 300), weights):
        assert number == last.get(source, number - 1) + 1
        last[source] = number


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6), st.integers(1, 3000))
@settings(deadline=None)
def test_deal_keeps_to_the_weights_at_every_moment(weights, samples):
    counts = Counter(source for source, _ in assign_source(range(samples), weights))
    assert ([counts[source] for source in range(len(weights))]
            == samples_per_source(samples, weights))
    for source, weight in enumerate(weights):
        assert abs(counts[source] - samples * weight / sum(weights)) <= len(weights)


def test_every_epoch_of_every_source_reads_each_row_once():
    # Four epochs of either source.
    rows = rows_for_samples(range(400), [30, 70], [3.0, 7.0], seed=5)
    for epoch in range(4):
        assert sorted(rows[100 * epoch:100 * epoch + 100].tolist()) == list(range(100))
    assert not np.array_equal(rows[:100], rows[100:200])


@pytest.mark.parametrize("cut", [1, 17, 399])
def test_rows_do_not_depend_on_what_was_asked_for_before(cut):
    counts, weights = [30, 50, 1], [1.0, 2.5, 0.1]
    whole = rows_for_samples(range(400), counts, weights, seed=1)
    parts = np.concatenate([rows_for_samples(range(cut), counts, weights, 1),
                            rows_for_samples(range(cut, 400), counts, weights, 1)])
    assert np.array_equal(whole, parts)
    assert not np.array_equal(whole, rows_for_samples(range(400), counts, weights, seed=2))


def test_splitmix64_is_the_published_one_on_ints_and_arrays():
    # The generator's first number for seed 0.
    assert splitmix64(SPLITMIX64_GAMMA) == 0xE220A8397B1DCDAF
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    assert splitmix64(values).tolist() == [splitmix64(value) for value in values.tolist()]


def test_seeds_and_rows_are_those_of_the_first_version():
    """Saved runs go on with them."""
    assert [step_seed(7, step, rank) for step, rank in ((0, 0), (1, 0), (0, -3))] == \
        [1278716055486554380, 3864604242192667276, 4127995935728536969]
    assert rows_for_samples(range(8), [30, 50, 1000], [1.0, 2.5, 7.0], seed=5).tolist() == \
        [905, 490, 416, 65, 474, 860, 1046, 42]
