"""LoRA students train as peft's own loop in plain torch does, in every layout of the ranks."""

from __future__ import annotations

import pytest
import yaml
from support.lora import EPS, assert_trains_as, with_peft, without_export, write_stage_config
from support.ranks import run_ranks
from support.reference_loop import reference_loop
from support.runs import write_recipe

LORA = {"rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(("ranks", "tensor_parallel", "stage"), [
    (1, 1, 3), (2, 1, 3), (2, 1, 2), (2, 1, 0), (2, 2, 3), (2, 2, 0), (2, 2, 2), (4, 2, 3)])
def test_adapters_train_as_pefts_own_loop_does(llama_pair, instructions_file, tmp_path, ranks,
                                               tensor_parallel, stage):
    recipe = write_recipe(
        tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
        student__lora=LORA, train__eps=EPS, tensor_parallel=tensor_parallel,
        data__prepared=str(tmp_path / "data"), data__isolate_documents=False,
        deepspeed=write_stage_config(tmp_path, stage))
    run_ranks(ranks, "train", recipe, target=without_export)
    truth = reference_loop(*llama_pair, yaml.safe_load(recipe.read_text()), tmp_path / "data",
                           with_peft(LORA))
    assert_trains_as(truth, tmp_path / "run")
