"""`push`: the card that the hub reads, what goes to it, and what it refuses.

The hub is a stand-in (support/hub_server.py); its client, huggingface_hub, is the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from support.checkpoints import copy_old_runs
from support.hub_server import HubServer, Repository
from transformers import AutoModelForCausalLM

from amid_ds.checkpoint import push
from amid_ds.checkpoint.card import exported_step, model_card
from amid_ds.checkpoint.export import keep_student, write_export
from amid_ds.checkpoint.state import TrainState
from amid_ds.cli import main
from amid_ds.config.parse import load_recipe, resolved

RUN_NAME = 'a "run": of\n#1'
LICENSE = {"license": "other", "license_name": 'ours: "v1"', "license_link": "LICENSE"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that trained and evaluated once, kept in fixtures, with the export of its last step,
    under a name that YAML has to quote; its student has a license, in its card and its own file."""
    root = copy_old_runs(tmp_path_factory.mktemp("push"))
    (root / "student" / "README.md").write_text(f"---\n{yaml.safe_dump(LICENSE)}---\n# small\n")
    (root / "student" / "LICENSE").write_text("ours")
    run = (root / "rollouts").rename(root / RUN_NAME)
    raw = yaml.safe_load((run / "recipe.yaml").read_text())
    for each in (raw["student"], raw["teacher"]):
        each["model"] = str(root / each["model"])
    for each in (*raw["data"]["train"], *raw["data"]["eval"]):
        each["path"] = str(root / each["path"])
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw | {"output_dir": str(run)}))
    recipe = load_recipe(run / "recipe.yaml")
    keep_student(recipe)
    for name in ("README.md", "LICENSE"):
        (root / "student" / name).unlink()
    write_export(run / "checkpoints" / "step_00000004", recipe, run / "model")
    return run


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which this process takes for the hub, with a token that may write to owner/."""
    with HubServer().serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server
        # Its connections have this test's timeouts.
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def model(run) -> Path:
    """A folder with a model."""
    return run.parent / "teacher"


def pushed(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in
            hub.repositories["owner/small"].branches[branch].items() if name != ".gitattributes"}


def files_of(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


def test_the_hubs_own_reader_finds_evaluations_and_license_in_a_runs_card(run):
    card = ModelCard.load(run / "model" / "README.md")
    line = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        key: line[key] for key in ("loss", "perplexity", "kl_to_teacher", "top1_agreement")}
    assert {(result.task_type, result.dataset_type, result.dataset_name)
            for result in card.data.eval_results} == {("text-generation", "heldout", "heldout")}
    facts = card.data.to_dict()
    assert {key: facts[key] for key in LICENSE} == LICENSE
    assert (run / "model" / "LICENSE").read_text() == "ours"
    assert facts["tags"] == ["distillation", "amid-ds"] and facts["library_name"] == "transformers"
    assert "base_model" not in facts and "datasets" not in facts, "they are folders and files"
    assert exported_step(run / "model") == 4


def test_a_card_has_the_whole_recipe_and_of_this_machines_paths_the_last_part(run):
    text = (run / "model" / "README.md").read_text()
    assert str(run.parent) not in text
    in_card = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    recipe = resolved(load_recipe(run / "recipe.yaml"))
    assert in_card["student"].pop("model") == "…/student"
    assert in_card["data"]["train"][0].pop("path") == "…/rows.jsonl"
    assert recipe["student"].pop("model") and recipe["data"]["train"][0].pop("path")
    assert in_card["train"] == recipe["train"] and in_card["student"] == recipe["student"]
    assert in_card["data"]["train"] == recipe["data"]["train"] and in_card.keys() == recipe.keys()


@pytest.fixture
def hub_run(tmp_path) -> Path:
    """The files that a card is made of, by hand: a run of models and data sets of the hub."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    sets = [{"path": "org/rows", "text": "t", "name": "one", "split": "test"},
            {"path": "org/twice", "text": "t", "name": "two"},
            {"path": "org/twice", "text": "t", "name": "three"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump({
        "student": {"model": "org/student"}, "teacher": {"model": "org/teacher"},
        "data": {"train": [{"path": path, "text": "t"} for path in (
            "org/rows", "a.jsonl", "a/folder-that-has-gone")], "eval": sets},
        "train": {"steps": 2, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 1,
                  "learning_rate": 1e-3}, "output_dir": str(run)}))
    (run / "provenance.json").write_text(json.dumps(
        {"student": {"model": "org/student", "files_sha256": None},
         "hub_data": ["org/rows", "org/twice"]}))
    (run / "eval.jsonl").write_text("".join(
        json.dumps({"step": step, "name": name, "loss": step + place, "kl_to_teacher": None}) + "\n"
        for step in (1, 2) for place, name in enumerate(("one", "two", "three"))))
    (run / "eval_tasks.jsonl").write_text("".join(
        json.dumps({"step": step, "name": "arc_easy", "acc": step / 3, "acc_stderr": 0.25}) + "\n"
        for step in (1, 2)))
    return run


def card_of(run: Path, step: int = 2, is_adapter: bool = False, **train: object) -> ModelCard:
    recipe = load_recipe(run / "recipe.yaml", [f"train.{key}={train[key]}" for key in train])
    return ModelCard(model_card(run / "checkpoints" / f"step_{step:08d}", recipe,
                                TrainState(step, 9), "bf16", is_adapter))


def test_models_and_data_of_the_hub_are_named_by_their_ids(hub_run):
    data = card_of(hub_run, is_adapter=True).data
    assert (data.base_model, data["base_model_relation"]) == ("org/student", "adapter")
    assert data.datasets == ["org/rows"] and data.library_name == "peft"
    assert card_of(hub_run).data["base_model_relation"] == "finetune"
    (hub_run / "provenance.json").write_text(json.dumps(
        {"student": {"model": "runs/other", "files_sha256": "12"}}))
    assert card_of(hub_run).data.base_model is None
    # A warm start, or a pruned student: what it began with has a card of ours.
    for folder, sign in (("student_files", "theirs"), ("start", "amid-ds")):
        (hub_run / folder).mkdir()
        (hub_run / folder / "README.md").write_text(
            f"---\ntags: [{sign}]\nbase_model: org/first\nlicense: other\n"
            "license_link: LICENSE\n---\n")
        data = card_of(hub_run).data
        assert data.base_model == (None if sign == "theirs" else "org/first")
    assert data.license_link == "https://huggingface.co/org/first/blob/main/LICENSE"


def test_results_are_of_the_models_own_step_and_each_on_its_own_set(hub_run):
    def results(card: ModelCard) -> dict[tuple[str, str | None, str], float]:
        return {(each.dataset_type, each.dataset_split, each.metric_type): each.metric_value
                for each in card.data.eval_results}

    assert results(card_of(hub_run)) == {
        ("org/rows", "test", "loss"): 2, ("two", None, "loss"): 3, ("three", None, "loss"): 4,
        ("arc_easy", None, "acc"): 2 / 3}
    assert results(card_of(hub_run, step=1))["arc_easy", None, "acc"] == 1 / 3
    # The evaluations measured the run's weights, not their mean, which the tasks did.
    assert results(card_of(hub_run, ema=0.5)) == {("arc_easy", None, "acc"): 2 / 3}
    (hub_run / "eval_tasks.jsonl").unlink()
    card = card_of(hub_run, step=3)
    assert card.data.eval_results is None and "## Evaluation at step 2" in card.text


def test_what_a_run_has_made_arrives_byte_for_byte_and_opens_as_the_model(run, hub, tmp_path,
                                                                          capsys):
    assert main(["push", str(run), "owner/small", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/owner/small"
    assert pushed(hub) == files_of(run / "model") and hub.repositories["owner/small"].private
    for name, content in pushed(hub).items():
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(3, 13)[None]
    there, here = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits
                   for folder in (tmp_path, run / "model"))
    assert torch.equal(there, here)


def test_a_second_push_sends_what_has_changed_and_deletes_nothing(run, hub):
    assert main(["push", str(run), "owner/small"]) == 0
    assert not hub.repositories["owner/small"].private
    first, sent = pushed(hub), list(hub.received)
    hub.repositories["owner/small"].branches["main"]["theirs.txt"] = b"kept"
    assert main(["push", str(run), "owner/small"]) == 0
    assert main(["push", str(run), "owner/small", "--license", "mit"]) == 0
    assert hub.received == sent and len(sent) == 1
    assert hub.repositories["owner/small"].commits == ["Upload by amid_ds: step 4"] * 2
    second = pushed(hub)
    assert {name for name in second if second[name] != first.get(name)} == {"README.md",
                                                                            "theirs.txt"}
    data = ModelCard(second["README.md"].decode()).data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data
    assert "license: other" in (run / "model" / "README.md").read_text(), "the file stays"


def test_a_branch_is_made_and_main_stays(run, hub, capsys):
    for _ in range(2):
        assert main(["push", str(run), "owner/small", "--revision", "exp/1"]) == 0
    assert capsys.readouterr().out.endswith("/owner/small/tree/exp%2F1\n")
    assert pushed(hub) == {} and pushed(hub, "exp/1") == files_of(run / "model")


def test_scores_of_tasks_that_came_after_the_export_are_in_the_card_that_goes(run, hub, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    for score in (0.5, 0.25):
        with (copied / "eval_tasks.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "name": "arc|easy", "acc": score}) + "\n")
        assert main(["push", str(copied), "owner/small"]) == 0
        card = ModelCard(pushed(hub)["README.md"].decode())
        assert [each.metric_value for each in card.data.eval_results
                if each.dataset_type == "arc|easy"] == [score]
        assert card.text.count("## Benchmarks") == 1 and f"| arc\\|easy | {score:g} |" in card.text
        assert len(card.data.eval_results) == 5 and card.text.count("## Mine") == (score < 0.5)
        # As of an export that had this score.
        (copied / "model" / "README.md").write_text(f"{card}\n## Mine\n")


def test_a_dry_run_shows_all_that_would_go_and_asks_nobody(run, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    model = Path(shutil.copytree(run / "model", tmp_path / "the model"))
    (model / ".git").mkdir()
    for name in (".git/config", "rows.jsonl", "optimizer.pt", "modeling_own.py", ".env"):
        (model / name).write_text("x" * 10)
    with (model / "README.md").open("a") as file:
        file.write(f"from {tmp_path}\n")
    before = sorted(model.rglob("*"))
    assert main(["push", str(model), "owner/small", "--private", "--revision", "v2",
                 "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for name in (*files_of(run / "model"), "modeling_own.py"):
        assert re.search(rf"│ {re.escape(name)} +│ +[\d.]+ (bytes|kB) │", shown), name
    assert "left out: .env, .git/, optimizer.pt, rows.jsonl\n" in shown
    assert "repository: owner/small, private; branch v2\n" in shown
    assert f"README.md names places of this machine: {tmp_path}\n" in shown
    assert "license: other" in shown and "value: " in shown
    assert hub.requests == [] and sorted(model.rglob("*")) == before
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert main(["push", str(model), "owner/small", "--private"]) == 0
    assert pushed(hub).keys() == {*files_of(run / "model"), "modeling_own.py"}


# What the hub does -> exit status, and what the message names.
FAULTS = {
    "no token": ({}, "", 2, "hf auth login"),
    "an unknown token": ({}, "hf_other", 2, "does not know the token"),
    "a token that may only read": ({}, "hf_reader", 2, "may not write to owner/small"),
    "a refusal in the middle": ({"/preupload/": 403}, "hf_writer", 2, "may not write"),
    "nothing there": ({"/preupload/": 404}, "hf_writer", 2, "as told: 404"),
    "an error of its own": ({"/repos/create": 500}, "hf_writer", 1, "500"),
    "no commit": ({"/commit/": 500}, "hf_writer", 1, "as told: 500"),
    "silence": ({"/repos/create": 0}, "hf_writer", 1, "timed out"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_the_hub_answers_is_one_message_and_no_file_changes(case, model, hub, capsys,
                                                                 monkeypatch):
    faults, token, status, named = FAULTS[case]
    hub.faults = faults
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(push, "TIMEOUTS", (0.3,) * 4)
    assert main(["push", str(model), "owner/small"]) == status
    message = capsys.readouterr().err
    assert message.count("amid-ds: ") == 1 and named in message, message
    assert "Traceback" not in message
    assert "owner/small" not in hub.repositories or pushed(hub) == {}


def test_a_hub_that_is_not_there_is_one_message(model, hub, capsys, monkeypatch):
    arguments = ["push", str(model), "owner/small"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(arguments) == 1
    assert "refused" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(arguments) == 2
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err


def test_ctrl_c_ends_it_though_files_are_on_their_way(model, hub, tmp_path, capsys):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    # Of two large files each has a thread of the client's.
    (copied / "tokenizer.model").write_bytes(b"pieces")
    others = set(threading.enumerate())
    hub.faults = {"PUT /blobs/": 0}

    def interrupt() -> None:
        while not any(request.startswith("PUT") for request in hub.requests):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # Programs that a shell has started in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        began = time.monotonic()
        assert main(["push", str(copied), "owner/small"]) == 1
        assert time.monotonic() - began < push.TIMEOUTS[1] / 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert "sends what is missing" in capsys.readouterr().err and pushed(hub) == {}
    # The threads are left by a command's end; here they end by themselves.
    hub.faults = {"PUT /blobs/": 404}
    hub.ending.set()
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith(("background work", "ThreadPoolExecutor")):
            thread.join()


def test_nothing_private_is_put_where_all_see_it(model, hub, capsys):
    hub.repositories["owner/small"] = Repository(private=False)
    assert main(["push", str(model), "owner/small", "--private"]) == 2
    assert "there already and public" in capsys.readouterr().err and pushed(hub) == {}


def test_weights_of_another_model_are_not_left_beside_these(model, hub, capsys):
    hub.repositories["owner/small"] = Repository(private=False)
    hub.repositories["owner/small"].branches["main"]["model.safetensors.index.json"] = b"{}"
    assert main(["push", str(model), "owner/small"]) == 2
    assert "model.safetensors.index.json" in capsys.readouterr().err
    assert pushed(hub).keys() == {"model.safetensors.index.json"}


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))


def local_adapters(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/models/base"}))


# Source, other arguments, what is done to it -> what the message names.
REFUSED = {
    "no owner": ("MODEL", ["small"], None, "owner/name"),
    "three parts": ("MODEL", ["a/b/c"], None, "owner/name"),
    "an odd name": ("MODEL", ["owner/sm all"], None, "alphanumeric"),
    "no branch": ("MODEL", ["owner/small", "--revision", "refs/pr/1"], None, "a branch"),
    "an odd license": ("MODEL", ["owner/small", "--license", "my own"], None, "apache-2.0"),
    "no folder": ("MODEL/none", ["owner/small"], None, "there is no folder"),
    "no model": ("MODEL", ["owner/small"], lambda folder: (folder / "config.json").unlink(),
                 "config.json"),
    "cut weights": ("MODEL", ["owner/small"], cut_weights, "weights of"),
    "a shard too few": ("MODEL", ["owner/small"], missing_shard, "00002-of-00002"),
    "adapters of a folder": ("MODEL", ["owner/small"], local_adapters, "/models/base"),
    "a dangling link": ("MODEL", ["owner/small"],
                        lambda folder: (folder / "a.json").symlink_to("no"), "no file"),
    "a card that is no text": ("MODEL", ["owner/small"],
                               lambda folder: (folder / "README.md").write_bytes(b"\xff"), "UTF-8"),
    "a checkpoint": ("RUN/checkpoints/step_00000004", ["owner/small"], None, "amid-ds export"),
    "a run's checkpoints": ("RUN/checkpoints", ["owner/small"], None, "amid-ds export"),
    "an unfinished run": ("RUN", ["owner/small"], lambda run: shutil.rmtree(run / "model"),
                          "step 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_published_is_refused_before_the_hub_is_asked(case, run, hub, model,
                                                                     tmp_path, capsys):
    source, arguments, change, named = REFUSED[case]
    places = {"MODEL": model, "RUN": run}
    kind, _, inside = source.partition("/")
    copied = Path(shutil.copytree(places[kind], tmp_path / "copied"))
    if change is not None:
        change(copied)
    for extra in ([], ["--dry-run"]):
        assert main(["push", str(copied / inside), *arguments, *extra]) == 2
        message = capsys.readouterr().err
        assert message.count("amid-ds: ") == 1 and named in message, message
    assert hub.requests == []
