"""A run's export: an ordinary Hugging Face folder with the run's logits, complete or absent."""

from __future__ import annotations

import functools
import json
import runpy
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.memory import memory_rise
from support.models import make_model
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import read_metrics, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from amid_ds.checkpoint import export
from amid_ds.checkpoint.manifest import list_checkpoints
from amid_ds.checkpoint.zero_shards import ZeroShards
from amid_ds.cli import main
from amid_ds.engine.backend import import_deepspeed
from amid_ds.models import weight_writer
from amid_ds.models.loading import meta_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The student, with a chat template and settings of generation; later the run and its files."""
    root = tmp_path_factory.mktemp("export")
    student = make_model(root / "student", "llama-tied", 0, extra_rows=2)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(student)
    GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=1,
                     pad_token_id=2).save_pretrained(student)
    return root


@pytest.fixture(scope="module")
def teacher(shared_model) -> Path:
    return shared_model("qwen2-tied", 1)


def logits_saving_rank(file: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that saves its student's logits after training."""
    from amid_ds.training.trainer import Trainer

    def run_and_save(trainer):
        real(trainer)
        with torch.no_grad():
            logits = trainer.engine.distiller.student.eval()(IDS).logits
        if trainer.world.is_main:
            torch.save(logits, file)

    real, Trainer.run = Trainer.run, run_and_save
    rank_main(argv, variables, log)


@pytest.fixture(scope="module")
def run(folder, teacher, instructions_file) -> Path:
    """A finished run in bf16, three steps with a checkpoint each; its logits are in logits.pt."""
    recipe = write_recipe(folder / "r.yaml", folder / "student", teacher, instructions_file,
                          folder / "run", train__steps=3, checkpoint__every=1,
                          teacher__dtype="bf16", checkpoint__keep=3,
                          deepspeed="ds_configs/zero3.json")
    ranks = Ranks(2, "train", recipe,
                  target=functools.partial(logits_saving_rank, str(folder / "logits.pt")))
    assert ranks.wait() == [0, 0], ranks.output()
    return folder / "run"


def fp32_weights(run: Path, step: int, model: Path) -> dict[str, torch.Tensor]:
    import_deepspeed()
    shapes = {name: parameter.shape
              for name, parameter in meta_model(str(model)).named_parameters()}
    shards = ZeroShards(run / "checkpoints" / f"step_{step:08d}", shapes)
    return {name: shards.whole(name) for name in shapes}


@torch.no_grad()
def logits_of(model: Path) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks compute
    logits = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()(IDS).logits
    torch.set_num_threads(threads)
    return logits


def test_every_run_ends_with_a_folder_that_gives_the_trained_students_logits_exactly(run, folder):
    assert torch.equal(logits_of(run / "model"), torch.load(folder / "logits.pt"))
    assert not torch.equal(logits_of(folder / "student"), torch.load(folder / "logits.pt"))


def test_what_the_student_came_with_is_there_and_the_card_says_where_it_comes_from(run, folder,
                                                                                   teacher):
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in list(file.keys()) and file.metadata() == {"format": "pt"}
    assert model.generation_config.temperature == 0.3
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder / "student").get_vocab()
    card = (run / "model" / "README.md").read_text()
    facts = json.loads((run / "provenance.json").read_text())
    last = read_metrics(run)[-1]
    for part in (facts["teacher"]["files_sha256"], facts["versions"]["deepspeed"],
                 f"| loss | {last['loss']:g} |", f"{last['tokens']:,} tokens",
                 f"`…/{teacher.name}`"):
        assert part in card


@pytest.mark.parametrize("step, dtype", [(None, "fp32"), (2, "bf16"), (1, None)])
def test_any_step_leaves_in_either_dtype_from_its_fp32_weights(step, dtype, run, folder, tmp_path):
    arguments = [] if step is None else ["--step", str(step)]
    arguments += [] if dtype is None else ["--dtype", dtype]
    assert main(["export", str(run), str(tmp_path / "out"), *arguments]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = fp32_weights(run, step or 3, folder / "student")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        exported_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        assert torch.equal(tensor, expected[name].to(exported_dtype)), name


def measured_export_process(source: str, out: str, notes: str, argv: list[str],
                            variables: dict[str, str], log: str) -> None:
    """Export in files of 8 MB, and record the peak rise of this process's memory."""
    # Imported by an export anyway, and not to be measured.
    from transformers import AutoModelForCausalLM  # noqa: F401

    weight_writer.FILE_BYTES = 8 * 10**6
    export.export(source, f"{out}.first", "bf16")
    with memory_rise("RssAnon", "VmRSS") as rise:
        export.export(source, out, "fp32")
    Path(notes).write_text(json.dumps(rise))


def test_an_export_of_several_files_takes_the_memory_of_about_one(instructions_file, tmp_path):
    model = make_model(tmp_path / "model", "llama", hidden_size=512, intermediate_size=2048,
                       num_hidden_layers=6)
    recipe = write_recipe(tmp_path / "r.yaml", model, None, instructions_file, tmp_path / "run",
                          train__steps=1)
    run_ranks(1, "train", recipe)
    out, notes = tmp_path / "out", tmp_path / "notes"
    process = Ranks(1, target=functools.partial(measured_export_process, str(tmp_path / "run"),
                                                str(out), str(notes)))
    assert process.wait() == [0]
    files = sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert len(files) > 8 and max(path.stat().st_size for path in files) < 9e6 and size > 80e6
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pytest.approx(size, rel=1e-3)
    anonymous, resident = json.loads(notes.read_text())
    assert anonymous < 12e6, f"{anonymous / 1e6:.0f} MB for files of 8 MB"
    assert resident < 30e6, f"{resident / 1e6:.0f} MB with the pages of the shards that are mapped"
    exported = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in fp32_weights(tmp_path / "run", 1, model).items():
        assert torch.equal(exported.get_parameter(name).detach(), tensor), name


def exporting_process(source: str, out: str, argv: list[str], variables: dict[str, str],
                      log: str) -> None:
    export.export(source, out)


def test_killed_while_it_writes_there_is_nothing_and_the_next_one_is_whole(run, tmp_path):
    out = tmp_path / "out"
    process = Ranks(1, target=functools.partial(exporting_process, str(run), str(out)))
    process.wait_until(lambda: list(tmp_path.glob(".out.amid-ds.*/model.safetensors")), 60,
                       interval=0.0005)
    process.signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert main(["export", str(run), str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits_of(out), logits_of(run / "model"))


def test_a_finished_run_killed_before_its_export_makes_it_at_the_next_start(run, folder, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "model")
    text = run_ranks(1, "train", folder / "r.yaml", f"output_dir={copied}").output()
    assert "nothing to do" in text
    assert torch.equal(logits_of(copied / "model"), logits_of(run / "model"))


# Arguments -> what the message names.
BAD = {
    "a folder in use": (["RUN", "ROOT"], ["already and not empty", "choose another name"]),
    "no checkpoint at all": (["ROOT", "OUT"],
                             ["holds no checkpoint", "RUN/checkpoints/step_00000100"]),
    "a step that is not there": (["RUN", "OUT", "--step", "7"],
                                 ["no checkpoint of step 7", "1, 2, 3"]),
    "a manifest that does not hold": (["COPY/checkpoints/step_00000003", "OUT"],
                                      ["manifest is damaged", "restore one"]),
    "too little disk": (["RUN", "OUT"], ["needs 0.0 MB", "make room there"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(case, run, folder, tmp_path, capsys,
                                                         monkeypatch):
    arguments, named = BAD[case]
    shutil.copytree(run, tmp_path / "copy")
    manifest = tmp_path / "copy" / "checkpoints" / "step_00000003" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": ', '"tokens": 1'))
    before = sorted(tmp_path.rglob("*"))
    if case == "too little disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    paths = {"RUN": run, "ROOT": folder, "OUT": tmp_path / "out", "COPY": tmp_path / "copy"}
    for name, path in paths.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert main(["export", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("amid-ds: ") == 1 and "expected:" in message and "remedy:" in message
    assert [word for word in named if word not in message] == [], message
    assert sorted(tmp_path.rglob("*")) == before


def test_deepspeeds_own_zero_to_fp32_works_on_our_checkpoints(run, folder, tmp_path, monkeypatch):
    script = run / "checkpoints" / "zero_to_fp32.py"
    assert ((run / "checkpoints" / "latest").read_text()
            == list_checkpoints(run / "checkpoints")[-1].name)
    monkeypatch.setattr(sys, "argv", [str(script), str(run / "checkpoints"), str(tmp_path / "out")])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    theirs = torch.load(tmp_path / "out" / "pytorch_model.bin")
    ours = fp32_weights(run, 3, folder / "student")
    assert {name.removeprefix("student.") for name in theirs} >= ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[f"student.{name}"], tensor), name


def weights_saving_rank(file: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that saves its student's weights and optimizer state before the first step."""
    from amid_ds.training.trainer import Trainer

    def save(trainer):
        weights = {name: parameter.detach().clone()
                   for name, parameter in trainer.engine.distiller.student.named_parameters()}
        moments = trainer.engine._deepspeed.optimizer.state
        torch.save((weights, trainer.state.step, len(moments)), file)

    Trainer.run = save
    rank_main(argv, variables, log)


@pytest.mark.parametrize("what, step",
                         [("run", 3), ("run/checkpoints/step_00000001", 1), ("run/model", None)])
def test_a_warm_start_takes_the_weights_of_a_run_a_checkpoint_or_an_export_alone(
        what, step, run, folder, teacher, instructions_file, tmp_path):
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    recipe = write_recipe(tmp_path / "r.yaml", folder / what, teacher, instructions_file,
                          tmp_path / "warm", deepspeed=str(tmp_path / "zero2.json"),
                          teacher__dtype="bf16")
    # The second time from the copy in its own folder.
    for attempt in range(2 if what == "run" else 1):
        started = Ranks(1, "train", recipe,
                        target=functools.partial(weights_saving_rank, str(tmp_path / "first.pt")))
        assert started.wait() == [0], started.output()
        assert ("begins with the weights of" in started.output()) == (step is not None
                                                                      and attempt == 0)
        weights, done, moments = torch.load(tmp_path / "first.pt")
        assert done == 0 and moments == 0
        expected = fp32_weights(run, step or 3, folder / "student")
        if step is None:
            expected = {name: tensor.bfloat16().float() for name, tensor in expected.items()}
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), name


def test_a_run_that_began_with_another_resumes_and_leaves_without_it(run, folder, teacher,
                                                                     instructions_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    recipe = write_recipe(tmp_path / "r.yaml", other, teacher, instructions_file, tmp_path / "warm",
                          train__steps=2, checkpoint__every=1, teacher__dtype="bf16")
    run_ranks(1, "train", recipe)
    shutil.rmtree(other)
    shutil.rmtree(tmp_path / "warm" / "checkpoints" / "step_00000002")
    shutil.rmtree(tmp_path / "warm" / "model")
    run_ranks(2, "train", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "warm" / "model")
    for name, tensor in fp32_weights(tmp_path / "warm", 2, folder / "student").items():
        assert torch.equal(model.get_parameter(name).detach(), tensor), name


def test_a_warm_start_from_a_run_without_a_checkpoint_is_refused(run, teacher, instructions_file,
                                                                 tmp_path, capsys):
    (tmp_path / "other").mkdir()
    shutil.copy(run / "recipe.yaml", tmp_path / "other" / "recipe.yaml")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "other", teacher, instructions_file,
                          tmp_path / "warm", teacher__dtype="bf16")
    assert main(["train", str(recipe)]) == 2
    assert "other holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "warm").exists()
