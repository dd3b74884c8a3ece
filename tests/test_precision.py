"""What is computed in bf16 and what in fp32, against float64."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main
from support.runs import write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.engine.ds_config import find_deepspeed_config
from amid_ds.planning.devices import find_device
from amid_ds.planning.plan import make_plan

MICRO_BATCHES = 32


def adding_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes to added.json how far its accumulated gradients are from the sum
    in float64 of those of its micro-batches, as a share of it; and their bytes."""
    def around(trainer, batch):
        from deepspeed.utils import safe_get_full_grad

        engine = trainer.engine
        named = {name: parameter for name, parameter in engine.distiller.named_parameters()
                 if parameter.requires_grad}
        sums = dict.fromkeys(named, 0.0)

        def add(name, gradient):
            assert gradient.dtype == torch.bfloat16
            sums[name] = sums[name] + gradient.double()

        hooks = [parameter.register_hook(functools.partial(add, name))
                 for name, parameter in named.items()]

        def compare():
            off = size = 0.0
            for name, parameter in named.items():
                off += (safe_get_full_grad(parameter).double() - sums[name]).square().sum().item()
                size += sums[name].square().sum().item()
            (trainer.job.run.path / "added.json").write_text(json.dumps(
                {"off": (off / size) ** 0.5, "bytes": engine.gradient_bytes()}))

        hooks.append(engine.before_optimizer_step(compare))
        yield
        for hook in hooks:
            hook.remove()

    patch_train_step(around)
    rank_main(argv, variables, log)


@pytest.mark.parametrize("name", ["zero3.json", pytest.param("zero2.json", marks=pytest.mark.slow),
                                  pytest.param("zero3_offload.json", marks=pytest.mark.slow)])
def test_micro_batches_gradients_add_up_a_thousand_times_closer_than_in_bf16(
        name, llama_pair, text_file, tmp_path):
    in_bf16 = json.loads(find_deepspeed_config(name).read_text())
    in_bf16["data_types"] = {"grad_accum_dtype": "bf16"}
    (tmp_path / "bf16.json").write_text(json.dumps(in_bf16))
    ranks, planned = {}, {}
    for way, config in {"default": name, "bf16": str(tmp_path / "bf16.json")}.items():
        recipe = write_recipe(
            tmp_path / f"{way}.yaml", *llama_pair, text_file, tmp_path / way, train__steps=1,
            train__global_batch_size=MICRO_BATCHES, deepspeed=config,
            data__prepared=str(tmp_path / f"data_{way}"))
        ranks[way] = Ranks(1, "train", recipe, target=adding_rank)
        planned[way] = make_plan(load_recipe(recipe), 1, 1, find_device("cpu", 1))
    added = {}
    for way, each in ranks.items():
        assert each.wait() == [0], each.output()
        added[way] = json.loads(Path(tmp_path / way / "added.json").read_text())
    # An addition in bf16 rounds by up to 1/256.
    assert added["bf16"]["off"] > 1e-3
    assert added["default"]["off"] < 1e-3 * added["bf16"]["off"]
    assert added["default"]["bytes"] == 2 * added["bf16"]["bytes"]
    if "offload" not in name:
        for way, values in added.items():
            assert planned[way].memory_per_rank["gradients"] == values["bytes"]
