"""Whoever can write a checkpoint can seal it anew; no command runs what stands in it even then."""

from __future__ import annotations

import enum
import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.checkpoints import Call, copy_old_runs, poison, reseal
from support.models import make_model
from support.ranks import Ranks, rank_main

from amid_ds.checkpoint.manifest import verify
from amid_ds.cli import main
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.tensor_files import read_torch_file
from amid_ds.errors import TrainingError

STEP = Path("checkpoints") / "step_00000004"


@pytest.fixture
def old_runs(tmp_path, monkeypatch) -> Path:
    folder = copy_old_runs(tmp_path)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "it ran"


def the_call_works(marker: Path) -> None:
    """Without restraint the file's call is made, so a test without a marker proves something."""
    torch.save([Call(marker)], marker.with_suffix(".pt"))
    torch.load(marker.with_suffix(".pt"), weights_only=False)
    assert marker.exists()
    marker.unlink()


def test_a_shard_is_read_where_python_pickles_a_stage_by_getattr(tmp_path, monkeypatch):
    """As Python 3.11.2 does, which Debian 12 has: done here by its way to pickle a member."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    import_deepspeed()
    monkeypatch.setattr(enum.Enum, "__reduce_ex__",
                        lambda member, protocol: (getattr, (type(member), member.name)))
    torch.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "shard.pt")
    assert read_torch_file(tmp_path / "shard.pt") == {"zero_stage": ZeroStageEnum.weights}


def rank_in(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank whose recipe's relative paths start from `folder`."""
    os.chdir(folder)
    rank_main(argv, variables, log)


def failed(folder: Path, *argv: str, ranks: int = 1) -> str:
    """The output of a command on ranks in `folder`, which all end with 1 and without a traceback.
    """
    started = Ranks(ranks, *argv, target=functools.partial(rank_in, str(folder)))
    assert started.wait() == [1] * ranks, started.output()
    assert "Traceback" not in started.output()
    return started.output()


@pytest.mark.parametrize("shard", ["mp_rank_00_model_states.pt",
                                   "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("command", ["resume", "export", "warm start", "another layout"])
def test_a_resealed_shard_with_a_call_in_it_runs_nothing(command, shard, old_runs, marker):
    the_call_works(marker)
    poison(old_runs / "stream" / STEP / shard, marker)
    reseal(old_runs / "stream" / STEP)
    assert verify(Path("stream") / STEP) is None
    recipe = yaml.safe_load(Path("stream.yaml").read_text())
    recipe["student"]["model"], recipe["output_dir"] = "stream", "warm"
    Path("warm.yaml").write_text(yaml.safe_dump(recipe))
    argv = {"resume": ["train", "stream.yaml"], "export": ["export", "stream", "out"],
            "warm start": ["train", "warm.yaml"],
            "another layout": ["train", "stream.yaml", "deepspeed=ds_configs/zero3_fp32.json"]
            }[command]
    message = failed(old_runs, *argv)
    assert shard in message and "is not read" in message
    assert not marker.exists() and not Path("out").exists()


def test_a_replay_buffer_and_converted_tensors_with_a_call_run_nothing(old_runs, marker):
    checkpoint = old_runs / "rollouts" / STEP
    kept = (checkpoint / "rollout.pt").read_bytes()
    poison(checkpoint / "rollout.pt", marker)
    reseal(checkpoint)
    assert "rollout.pt is not read" in failed(old_runs, "train", "rollouts.yaml")
    # That start has converted the checkpoint of two ranks.
    (checkpoint / "rollout.pt").write_bytes(kept)
    reseal(checkpoint)
    poison(next(iter((checkpoint / "whole").glob("*norm.weight.pt"))), marker)
    reseal(checkpoint / "whole")
    assert "norm.weight.pt is not read" in failed(old_runs, "train", "rollouts.yaml")
    assert not marker.exists()


def test_both_ranks_end_with_1_when_the_shard_of_one_is_refused(old_runs, marker):
    shard = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    poison(old_runs / "rollouts" / STEP / shard, marker)
    reseal(old_runs / "rollouts" / STEP)
    assert f"{shard} is not read" in failed(old_runs, "train", "rollouts.yaml", ranks=2)
    assert not marker.exists()


def test_a_manifest_without_files_or_with_foreign_names_is_damaged(old_runs, marker, capsys):
    checkpoint = old_runs / "stream" / STEP
    poison(checkpoint / "mp_rank_00_model_states.pt", marker)
    for change in (lambda content: content["files"].clear(),
                   lambda content: content["files"].update({"../../recipe.yaml": {}}),
                   lambda content: content["files"].update(x=None),
                   lambda content: content.update(files=[]),
                   lambda content: content["state"].update(zero_stage=7),
                   lambda content: content["state"].update(ranks=0),
                   lambda content: content["state"].update(step="4"),
                   lambda content: content.update(state=[])):
        shutil.copy(Path(__file__).parent / "fixtures" / "old_runs" / "stream" / STEP
                    / "manifest.json", checkpoint)
        reseal(checkpoint, change)
        assert verify(checkpoint) == "the manifest is damaged"
    assert main(["train", "stream.yaml"]) == 1 and main(["export", "stream", "out"]) == 2
    assert capsys.readouterr().err.count("the manifest is damaged") >= 2 and not marker.exists()


def test_a_file_that_the_manifest_does_not_list_is_refused(old_runs, marker, capsys):
    checkpoint = old_runs / "stream" / STEP
    # DeepSpeed would take the first file of this ending for the optimizer's.
    shutil.copy(checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
                checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "bf16_zero_pp_rank_0" in (verify(checkpoint) or "")
    assert main(["train", "stream.yaml"]) == 1 and main(["export", "stream", "out"]) == 2
    message = capsys.readouterr().err
    assert message.count("bf16_zero_pp_rank_0") >= 2 and "not in its manifest" in message
    # What a file system or an unfinished conversion leaves is hidden, and never opened.
    (checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(
        checkpoint / ".nfs_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert verify(checkpoint) is None and main(["export", "stream", "out"]) == 0


def test_a_shard_that_lacks_what_the_manifest_says_is_one_message(old_runs):
    checkpoint = old_runs / "stream" / STEP
    content = read_torch_file(checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    del content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    torch.save(content, checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    reseal(checkpoint)
    for argv in (["train", "stream.yaml"], ["export", "stream", "out"]):
        assert "single_partition_of_fp32_groups" in failed(old_runs, *argv)


def test_a_pickled_model_with_a_call_in_it_runs_nothing(tmp_path, marker):
    from amid_ds.models.loading import load_causal_lm

    make_model(tmp_path / "model", "llama")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save({"x": Call(marker)}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights of .*model"):
        load_causal_lm(str(tmp_path / "model"), "fp32")
    assert not marker.exists()


def test_nothing_but_deepspeeds_own_records_is_allowed(tmp_path):
    torch.save({"size": torch.Size([2]), "path": Path("x")}, tmp_path / "file.pt")
    with pytest.raises(TrainingError, match=r"file.pt is not read: .*Path"):
        read_torch_file(tmp_path / "file.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "file.pt").read_bytes()[:100])
    for content in (b"", b"garbage", (tmp_path / "cut.pt").read_bytes()):
        (tmp_path / "cut.pt").write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(TrainingError, match=r"cut.pt is not read"):
                read_torch_file(tmp_path / "cut.pt", mmap=mmap)
    with pytest.raises(TrainingError, match=r"absent.pt cannot be read: No such file"):
        read_torch_file(tmp_path / "absent.pt")
