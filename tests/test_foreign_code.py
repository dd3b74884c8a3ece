"""Python code that comes with a model runs where the user of this command allows it, or nowhere.

What another run's recipe, or its measurements, say of `trust_remote_code` decides nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.models import make_model
from support.ranks import run_ranks
from support.runs import write_recipe
from transformers import dynamic_module_utils

from amid_ds.cli import main

CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = 'own'


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def own_model(modules_cache, tmp_path_factory) -> Path:
    """A Llama under another name, with Python code in its folder as hub models have it."""
    folder = make_model(tmp_path_factory.mktemp("own") / "model", "llama", 0)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"],
               "auto_map": {"AutoConfig": "own.OwnConfig",
                            "AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def their_run(own_model, shared_model, text_file, tmp_path_factory) -> Path:
    """A finished run of somebody who trusts the student's code."""
    run = tmp_path_factory.mktemp("theirs") / "run"
    recipe = write_recipe(run.parent / "r.yaml", own_model, shared_model("gpt2", 1), text_file, run,
                          train__steps=5, train__global_batch_size=1)
    run_ranks(1, "train", recipe, "student.trust_remote_code=true")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["student"]["trust_remote_code"]
    assert "trust_remote_code: true" in json.loads((run / "measured.json").read_text())["recipe"]
    return run


@pytest.fixture
def loaded(monkeypatch, tmp_path) -> list[str]:
    """The classes that were taken out of a model's own code in this process."""
    names: list[str] = []
    get = dynamic_module_utils.get_class_in_module

    def record(name, *args, **kwargs):
        names.append(name)
        return get(name, *args, **kwargs)

    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", record)
    monkeypatch.chdir(tmp_path)
    return names


def refused(message: str) -> bool:
    return "Python code of its own" in message and "trust" in message


@pytest.mark.parametrize("command", [
    ["plan", "RECIPE"], ["train", "RECIPE"], ["doctor", "RECIPE"],
    ["submit", "RECIPE", "--dry-run", "--ranks-per-node", "1"],
    ["sweep", "RECIPE", "loss.lam=0.1,0.2"]], ids=lambda command: command[0])
def test_a_run_as_student_does_not_bring_its_owners_trust(their_run, shared_model, text_file,
                                                          tmp_path, loaded, capfd, command):
    recipe = write_recipe(tmp_path / "r.yaml", their_run, shared_model("gpt2", 1), text_file,
                          tmp_path / "run", train__global_batch_size=1, train__steps=3)
    status = main([str(recipe) if word == "RECIPE" else word for word in command])
    captured = capfd.readouterr()
    assert status != 0 and refused(captured.out + captured.err), captured
    assert "student.trust_remote_code" in captured.out + captured.err
    assert loaded == [] and not (tmp_path / "run" / "start").exists()


def test_the_users_own_recipe_lets_a_runs_code_run(their_run, shared_model, text_file, tmp_path,
                                                   loaded):
    recipe = write_recipe(tmp_path / "r.yaml", their_run, shared_model("gpt2", 1), text_file,
                          tmp_path / "run", train__global_batch_size=1, train__steps=1)
    assert main(["plan", str(recipe), "student.trust_remote_code=true"]) == 0
    assert "OwnForCausalLM" in loaded
    run_ranks(1, "train", recipe, "student.trust_remote_code=true")
    assert (tmp_path / "run" / "start" / "own.py").is_file()


@pytest.mark.parametrize("command", [
    ["plan", "--check", "RUN", "--device", "cpu"], ["export", "RUN", "out"],
    ["eval", "MODEL", "--data", "TEXT"],
    ["generate", "MODEL", "--prompts", "ROWS", "--out", "o.jsonl", "--max-new-tokens", "2"],
], ids=lambda part: part[0])
def test_a_command_without_a_recipe_asks_for_its_flag(their_run, own_model, text_file,
                                                      instructions_file, loaded, capsys, command):
    names = {"RUN": their_run, "MODEL": own_model, "TEXT": text_file, "ROWS": instructions_file}
    arguments = [str(names.get(word, word)) for word in command]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert refused(message) and "--trust-remote-code" in message
    assert loaded == []
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert loaded


def test_a_report_runs_no_code_and_says_why_there_is_no_plan(their_run, loaded, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(their_run)]) == 0
    page = Path("report.html").read_text()
    assert refused(page) and "--trust-remote-code" in page
    assert loaded == []
    assert main(["report", str(their_run), "--trust-remote-code"]) == 0
    assert loaded and not refused(Path("report.html").read_text())


def test_the_flag_beside_a_recipe_is_refused(shared_model, text_file, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama"), shared_model("gpt2", 1),
                          text_file, tmp_path / "run")
    assert main(["plan", str(recipe), "--trust-remote-code"]) == 2
    assert "the recipe's own keys" in capsys.readouterr().err
