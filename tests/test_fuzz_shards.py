"""Damaged and foreign checkpoints and weights end in one message: fixed seeds, fixed counts."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import OLD_RUNS, copy_old_runs, reseal

from amid_ds.cli import main
from amid_ds.errors import InputError
from amid_ds.models.loading import load_causal_lm

STEP = Path("checkpoints") / "step_00000004"
FEW, MANY = range(12), range(12, 150)
# What a changed manifest may hold in any place.
JSON_VALUES: list[object] = [None, True, -1, 0, 7, 1e308, 10 ** 30, "", "../x", "é\0", [], {}, [[]],
                             {"a": None}, "step_00000004"]


def changed(data: bytes, chance: random.Random) -> bytes:
    """The bytes with some flipped, cut off, doubled, or filled with zeros."""
    at, length = chance.randrange(len(data)), chance.choice((1, 4, 100))
    match chance.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(length) + data[at + length:]
        case 2:
            return data[:at] + data[at:at + length] + data[at:]
        case 3:
            return data[:at] + chance.randbytes(length) + data[at + length:]
    flipped = bytearray(data)
    for _ in range(chance.choice((1, 3, 20))):
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def change_pickle(file: Path, chance: random.Random) -> None:
    """Change the pickle in a file of torch.save; the archive around it stays sound."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, changed(data, chance) if name.endswith("data.pkl") else data)


def change_value(content: object, chance: random.Random) -> None:
    """Put something else in a random place of a JSON value."""
    while isinstance(content, (dict, list)) and content:
        key = chance.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if not isinstance(content[key], (dict, list)) or chance.random() < 0.3:
            content[key] = chance.choice(JSON_VALUES)
            return
        content = content[key]


def one_message(argv: list[str], capsys) -> None:
    """Run the command: it succeeds, or says in one message why not."""
    status = main(argv)
    message = capsys.readouterr().err
    assert status in (0, 1, 2) and "Traceback" not in message
    assert message.count("amid-ds: ") == (status != 0), message


@pytest.fixture
def old_runs(tmp_path, monkeypatch) -> Path:
    folder = copy_old_runs(tmp_path)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(params=[pytest.param(FEW, id="few"),
                        pytest.param(MANY, id="many", marks=pytest.mark.slow)])
def seeds(request) -> range:
    return request.param


@pytest.mark.parametrize("change", [change_pickle, lambda file, chance: file.write_bytes(
    changed(file.read_bytes(), chance))], ids=["the pickle", "any bytes"])
@pytest.mark.parametrize("run", ["stream", "rollouts"])
def test_changed_shards_that_are_sealed_anew(run, change: Callable[[Path, random.Random], None],
                                             seeds, old_runs, capsys):
    checkpoint = old_runs / run / STEP
    for seed in seeds:
        chance = random.Random(seed)
        shutil.rmtree(checkpoint)
        shutil.copytree(OLD_RUNS / run / STEP, checkpoint)
        change(chance.choice(sorted(checkpoint.glob("*.pt"))), chance)
        reseal(checkpoint)
        shutil.rmtree("out", ignore_errors=True)
        one_message(["export", run, "out"], capsys)


def test_changed_manifests_that_are_sealed_anew_or_not(seeds, old_runs, capsys):
    checkpoint = old_runs / "stream" / STEP
    for seed in seeds:
        chance = random.Random(seed)
        shutil.copy(OLD_RUNS / "stream" / STEP / "manifest.json", checkpoint)
        if seed % 3:
            reseal(checkpoint, lambda content, chance=chance: change_value(content, chance))
        else:
            path = checkpoint / "manifest.json"
            path.write_bytes(changed(path.read_bytes(), chance))
        shutil.rmtree("out", ignore_errors=True)
        one_message(["export", "stream", "out"], capsys)
        one_message(["checkpoints", "stream"], capsys)


def test_changed_weight_files_and_their_index(seeds, shared_model, tmp_path):
    from transformers import AutoModelForCausalLM

    source, folder = tmp_path / "source", tmp_path / "model"
    shutil.copytree(shared_model("llama", 0), source)
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    index = "model.safetensors.index.json"
    for seed in seeds:
        chance = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        if seed % 3:
            file = chance.choice(sorted(folder.glob("model*")))
            # The header is where a reader can go wrong: most changes go there.
            data = file.read_bytes()
            head = len(data) if seed % 2 else 600
            file.write_bytes(changed(data[:head], chance) + data[head:])
        else:
            content = json.loads((folder / index).read_text())
            change_value(content, chance)
            (folder / index).write_text(json.dumps(content))
        with contextlib.suppress(InputError):
            load_causal_lm(str(folder), "fp32")
