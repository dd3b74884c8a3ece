"""The GPU's branches, on a faked CUDA: what a GPU computes is not tested here."""

from __future__ import annotations

import functools

import pytest
from support.fake_cuda import fake_cuda_rank
from support.ranks import Ranks, run_ranks
from support.runs import comparable_metrics, write_recipe


@pytest.fixture(scope="module")
def recipe(llama_pair, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return functools.partial(write_recipe, folder / "r.yaml", *llama_pair, text_file,
                             train__steps=4, data__prepared=str(folder / "data"))


def test_a_run_on_faked_gpus_has_the_losses_of_one_on_cpus(recipe, tmp_path):
    run_ranks(2, "train", recipe(tmp_path / "cpu"))
    ranks = Ranks(2, "train", recipe(tmp_path / "gpu"), target=fake_cuda_rank)
    assert ranks.wait() == [0, 0], ranks.output()
    assert comparable_metrics(tmp_path / "gpu") == comparable_metrics(tmp_path / "cpu")
