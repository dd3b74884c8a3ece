"""Nothing around a run ends it: streams, disks, signals. Ranks that cannot meet end at once."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import safetensors
import yaml
from support.disks import SmallDisk, obeying_permissions
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import count_steps, read_metrics, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amid_ds.checkpoint.manifest import list_checkpoints, verify
from amid_ds.cli import main
from amid_ds.data.prepared import PreparedDataset
from amid_ds.distributed import rendezvous
from amid_ds.distributed.launch import free_port
from amid_ds.errors import (
    InputError,
    RankError,
    RankInputError,
    exit_status,
    expected_error,
)
from amid_ds.files.atomic import replace_text
from amid_ds.monitor.memory_probe import PROBED_STEP

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE",
                    "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID",
                    "SLURM_STEPID", "SLURM_JOB_NODELIST", "SLURM_LOCALID")


@pytest.fixture(scope="module")
def recipe_for(llama_pair, text_file, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, **changes): a recipe of 6 steps, on data that are prepared once."""
    prepared = tmp_path_factory.mktemp("prepared") / "data"

    def write(run: Path, **changes) -> Path:
        return write_recipe(run.with_suffix(".yaml"), *llama_pair, text_file, run,
                            **{"data__prepared": str(prepared), **changes})
    return write


def rank_with_streams(argv: list[str], variables: dict[str, str], log: str) -> None:
    """As rank_main, with a stdout and stderr that cannot be written."""
    os.environ.update(variables)
    Path(log).touch()
    for number in (1, 2):
        if variables["STREAMS"] == "reader gone":
            reading, writing = os.pipe()
            os.close(reading)
        else:
            writing = os.open("/dev/full", os.O_WRONLY)
        os.dup2(writing, number)
    if variables["STREAMS"] == "closed":
        os.close(1)
        os.close(2)
    # As the interpreter begins and ends.
    streams = [None if variables["STREAMS"] == "closed" else
               os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)]
    sys.stdout, sys.stderr = streams
    status = main(argv)
    for stream in filter(None, streams):
        try:
            stream.flush()
        except OSError:
            status = 120
    os._exit(status)


@pytest.mark.parametrize("streams", ["reader gone", "full", "closed"])
def test_a_run_goes_on_when_nobody_can_read_its_messages(streams, recipe_for, tmp_path):
    recipe = recipe_for(tmp_path / "run", train__steps=3, checkpoint__every=2)
    ranks = Ranks(1, "train", recipe, variables={"STREAMS": streams}, target=rank_with_streams)
    assert ranks.wait() == [0]
    assert count_steps(tmp_path / "run") == 3
    assert [verify(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [None,
                                                                                             None]


@pytest.mark.parametrize("streams", ["reader gone", "full", "closed"])
def test_a_result_that_cannot_be_written_is_status_1(streams):
    ranks = Ranks(1, "recipes", "list", variables={"STREAMS": streams}, target=rank_with_streams)
    assert ranks.wait() == [1]


def test_a_command_whose_reader_is_gone_says_so_in_one_message():
    done = subprocess.run(f"{sys.executable} -m amid_ds recipes > /dev/full", shell=True,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == ("amid-ds: the output cannot be written: "
                           "[Errno 28] No space left on device\n")


def rank_without_temporary_folder(argv: list[str], variables: dict[str, str], log: str) -> None:
    """As rank_main, once it has begun without a folder for temporary files."""
    def refuse(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", "/tmp")

    tempfile.tempdir = "/nowhere"
    tempfile.mkdtemp = tempfile.mkstemp = refuse
    rank_main(argv, {**variables, "TMPDIR": "/nowhere"}, log)


# A thread that asks for the interpreter while it ends is killed by it, and one of C++ then aborts.
ENDING = """
import atexit, sys
from amid_ds.cli import run

class Kept:
    def __del__(self):
        print("the interpreter's own end")

kept, sys.argv = Kept(), ["amid-ds", *sys.argv[1:]]
atexit.register(print, "functions of the end")
if "bug" in sys.argv:
    sys.modules["amid_ds.cli.main"].main = lambda: 1 / 0
if "library" in sys.argv:
    sys.modules["amid_ds.cli.main"].main = lambda: sys.exit("it cannot go on")
run()
"""


@pytest.mark.parametrize(("words", "status"), [(["recipes"], 0), (["--help"], 0), (["no"], 2),
                                               (["plan", "no.yaml"], 2), (["bug"], 1),
                                               (["library"], 1)])
def test_a_process_ends_with_its_status_and_without_the_interpreters_end(words, status):
    done = subprocess.run([sys.executable, "-c", ENDING, *words], capture_output=True, text=True)
    assert done.returncode == status
    assert "functions of the end" in done.stdout and "interpreter" not in done.stdout
    assert ("ZeroDivisionError" in done.stderr) == (words == ["bug"])


def test_wrong_words_without_a_stderr_are_still_status_2():
    command = ["sh", "-c", '"$0" -m amid_ds no 2>&-', sys.executable]
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_a_run_needs_no_temporary_folder(recipe_for, tmp_path):
    """A new one, a save, a resume and the export at its end."""
    recipe = recipe_for(tmp_path / "run", checkpoint__every=2)
    for steps in (4, 6):
        ranks = Ranks(2, "train", recipe, f"train.steps={steps}", "data.workers=2",
                      "checkpoint.allow_change=[train.steps]",
                      target=rank_without_temporary_folder)
        assert ranks.wait() == [0, 0], ranks.output()
        shutil.rmtree(tmp_path / "run" / "model")
    assert "SAVE FAILED" not in ranks.output() and "resumed after step 4" in ranks.output()


def test_a_run_goes_on_while_its_folder_is_full_and_its_log_is_whole(recipe_for, tmp_path):
    disk = SmallDisk(tmp_path / "disk", 8)
    try:
        run = disk.folder / "run"
        recipe = recipe_for(run, train__steps=100_000, checkpoint__every=100_000)
        ranks = Ranks(1, "train", recipe)
        # After the step that is measured.
        ranks.wait_until(lambda: count_steps(run) > PROBED_STEP)
        disk.fill()
        ranks.wait_until(lambda: ranks.output().count("cannot be written") == 2)
        time.sleep(0.5)
        disk.repair()
        ranks.wait_until(lambda: ranks.output().count("is written again") == 2)
        (run / "STOP").touch()
        assert ranks.wait() == [75], ranks.output()
        steps = [line["step"] for line in read_metrics(run)]
        assert steps == list(range(1, len(steps) + 1))
        board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        assert [point.step for point in board.Scalars("loss/total")] == steps
        assert ranks.output().count("cannot be written") == 2, "one message for each file"
        assert len(list_checkpoints(run / "checkpoints")) == 1
    finally:
        disk.vanish()


def test_a_hangup_stops_the_run_in_order(recipe_for, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for(run, train__steps=300)
    ranks = Ranks(2, "train", recipe)
    ranks.wait_until(lambda: count_steps(run) >= 2)
    ranks.signal(signal.SIGHUP)
    assert ranks.wait() == [75, 75], ranks.output()
    assert "SIGHUP" in ranks.output()
    assert len(list_checkpoints(run / "checkpoints")) == 1


def rank_under_nohup(argv: list[str], variables: dict[str, str], log: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    rank_main(argv, variables, log)


def test_under_nohup_a_run_outlives_its_terminal(recipe_for, tmp_path):
    run = tmp_path / "run"
    ranks = Ranks(1, "train", recipe_for(run, train__steps=30), target=rank_under_nohup)
    ranks.wait_until(lambda: count_steps(run) >= 2)
    ranks.signal(signal.SIGHUP)
    assert ranks.wait() == [0], ranks.output()
    assert count_steps(run) == 30


def damage_a_row_of_rank_1(folder: Path) -> None:
    """Flip a bit of a prepared folder so that one row, of rank 1 of 2, fails its checksum."""
    shard, = (folder / "shards").glob("*.arrow")
    content = shard.read_bytes()
    for offset in range(len(content) // 2, len(content)):
        shard.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1:])
        if len(bad := damaged_rows(folder)) == 1 and bad[0] % 2 == 1:
            return
    raise AssertionError("no such bit")


def damaged_rows(folder: Path) -> list[int]:
    prepared, bad = PreparedDataset(folder), []
    for number in range(len(prepared)):
        try:
            prepared.row(number)
        except InputError:
            bad.append(number)
    return bad


def test_an_evaluation_row_that_is_damaged_on_one_rank_ends_all_at_once_with_2(
        llama_pair, text_file, instructions_file, tmp_path):
    evaluation = {"path": str(instructions_file), "prompt": "prompt", "response": "response",
                  "name": "held-out"}
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          data__eval=[evaluation], train__steps=2)
    run_ranks(1, "prepare", recipe)
    damage_a_row_of_rank_1(tmp_path / "run" / "data" / "eval" / "held-out")
    ranks = Ranks(2, "train", recipe)
    assert ranks.wait() == [2, 2], ranks.output()
    assert ranks.output().count("is damaged") == 1 and "Traceback" not in ranks.output()


@pytest.fixture
def launched(monkeypatch):
    """launched(VARIABLE=value): the variables of a launcher, in place of all others."""
    def launch(**variables: object) -> None:
        for name in LAUNCH_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    return launch


WRONG_VARIABLES = {
    "no address": dict(RANK=0, WORLD_SIZE=2, MASTER_PORT=29500),
    "no port": dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1"),
    "a port that is none": dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=99999),
    "a rank that is no number": dict(RANK="x", WORLD_SIZE=2),
    "a rank beyond the size": dict(RANK=2, WORLD_SIZE=2),
    "a negative rank": dict(RANK=-1, WORLD_SIZE=2),
    "no ranks": dict(RANK=0, WORLD_SIZE=0),
    "a size that is no number": dict(RANK=0, WORLD_SIZE="two"),
    "a rank without a size": dict(RANK=1),
    "a size without a rank": dict(WORLD_SIZE=2),
    "an empty rank": dict(RANK="", WORLD_SIZE=2),
    "sbatch without srun": dict(SLURM_JOB_ID=7, SLURM_NTASKS=2, SLURM_PROCID=0, SLURM_LOCALID=0,
                                SLURM_JOB_NODELIST="n[1-2]"),
    "srun's without a node list": dict(SLURM_JOB_ID=7, SLURM_NTASKS=2, SLURM_PROCID=0,
                                       SLURM_LOCALID=0, SLURM_STEP_ID=0),
}


@pytest.mark.parametrize("wrong", WRONG_VARIABLES)
def test_wrong_variables_of_a_launcher_are_one_message(wrong, recipe_for, launched, tmp_path,
                                                       capsys):
    launched(**WRONG_VARIABLES[wrong])
    assert main(["train", str(recipe_for(tmp_path / "run"))]) == 1
    printed = capsys.readouterr().err
    assert "expected:" in printed and "remedy:" in printed and printed.count("amid-ds: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_comes_is_one_message(rank, recipe_for, launched, tmp_path, capsys,
                                                monkeypatch):
    monkeypatch.setattr(rendezvous, "MEET_S", 1.0)
    launched(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert main(["train", str(recipe_for(tmp_path / "run"))]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"amid-ds: rank {rank} on ") and "did not meet" in printed
    assert printed.count("amid-ds: ") == 1 and "Traceback" not in printed


def test_a_port_that_is_taken_is_one_message(recipe_for, launched, tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        launched(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=other.getsockname()[1])
        assert main(["train", str(recipe_for(tmp_path / "run"))]) == 1
    printed = capsys.readouterr().err
    assert "address already in use" in printed and printed.count("amid-ds: ") == 1


def rank_without_home(argv: list[str], variables: dict[str, str], log: str) -> None:
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "HF_HOME", "MPLCONFIGDIR"):
        os.environ.pop(name, None)
    rank_main(argv, {**variables, "HOME": "/proc/nowhere"}, log)


def test_a_run_needs_no_home(recipe_for, tmp_path):
    """Nor do the caches of what it is made of."""
    ranks = Ranks(2, "train", recipe_for(tmp_path / "run"), target=rank_without_home)
    assert ranks.wait() == [0, 0], ranks.output()
    assert count_steps(tmp_path / "run") == 6


@pytest.fixture
def closed_folder(tmp_path) -> Iterator[Path]:
    """A folder that its owner may not enter, with nothing of interest in it."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    yield folder
    folder.chmod(0o755)


COMMANDS_ON_A_FOLDER = {
    "plan a recipe there": ["plan", "{closed}/r.yaml"],
    "plan for a student there": ["plan", "{recipe}", "student.model={closed}/s"],
    "train into it": ["train", "{recipe}", "output_dir={closed}/run"],
    "train on data there": ["train", "{recipe}", "data.prepared={closed}/data"],
    "train by a configuration there": ["train", "{recipe}", "deepspeed={closed}/ds.json"],
    "train with a teacher there": ["train", "{recipe}", "teacher.model={closed}/t"],
    "prepare into it": ["prepare", "{recipe}", "data.prepared={closed}/data"],
    "tokenizer into it": ["tokenizer", "train", "{recipe}", "{closed}/tok", "--vocab-size", "300"],
    "status": ["status", "{closed}/run"],
    "checkpoints": ["checkpoints", "{closed}/run"],
    "report": ["report", "{closed}/run"],
    "export": ["export", "{closed}/run", "out"],
    "plan --check": ["plan", "--check", "{closed}/run"],
    "demo": ["demo", "--out", "{closed}/demo"],
    "study": ["study", "--out", "{closed}/study"],
}


@pytest.mark.parametrize("name", COMMANDS_ON_A_FOLDER)
def test_a_folder_without_permission_is_one_message_and_2(name, closed_folder, recipe_for,
                                                          tmp_path, capsys):
    recipe = recipe_for(tmp_path / "run")
    arguments = [argument.format(closed=closed_folder, recipe=recipe)
                 for argument in COMMANDS_ON_A_FOLDER[name]]
    with obeying_permissions():
        assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("amid-ds: ") == 1 and str(closed_folder) in printed
    assert "expected:" in printed and "Traceback" not in printed


@pytest.mark.parametrize("state", ["full", "read-only"])
@pytest.mark.parametrize("command", [
    ["prepare", "{recipe}", "data.prepared={disk}/data"],
    ["tokenizer", "train", "{recipe}", "{disk}/tok", "--vocab-size", "300"],
    ["generate", "{student}", "--prompts", "{prompts}", "--out", "{disk}/answers.jsonl",
     "--max-new-tokens", "4"],
    ["train", "{recipe}", "output_dir={disk}/run"]], ids=lambda command: command[0])
def test_a_disk_that_cannot_be_written_is_one_message_and_2(
        command, state, recipe_for, llama_pair, instructions_file, tmp_path, capsys):
    disk = SmallDisk(tmp_path / "disk", 0.3)
    try:
        disk.fill() if state == "full" else disk.make_read_only()
        assert main([argument.format(disk=disk.folder, recipe=recipe_for(tmp_path / "run"),
                                     student=llama_pair[0], prompts=instructions_file)
                     for argument in command]) == 2
        printed = capsys.readouterr().err
        assert printed.count("amid-ds: ") == 1 and "Traceback" not in printed
        assert ("No space left" if state == "full" else "Read-only") in printed
    finally:
        disk.vanish()


class NotUTF8:
    def __init__(self) -> None:
        b"\xff".decode()


@pytest.mark.parametrize("raises, status", [
    (lambda: os.stat("/nowhere/at/all"), 2), (lambda: os.listdir(__file__), 2),
    (lambda: json.loads("{"), 2), (NotUTF8, 2), (lambda: gzip.decompress(b"\x1f\x8b\x08"), 2),
    (lambda: pa.ipc.open_stream(b"not arrow"), 2), (lambda: yaml.safe_load("{"), 2),
    (lambda: safetensors.deserialize(b"short"), 2), (lambda: pickle.loads(b"\x80"), 2),
    (lambda: json.loads("[" * 100_000), 2), (lambda: bytearray(1 << 62), 1),
    (lambda: socket.create_connection(("127.0.0.1", 1)), 1), (lambda: os.read(10**6, 1), 1),
    (lambda: {}["a bug"], None), (lambda: 1 / 0, None), (lambda: int("x"), None)])
def test_errors_of_the_system_and_of_readers_are_messages_and_bugs_are_not(raises, status):
    with pytest.raises(Exception) as caught:
        raises()
    message = expected_error(caught.value)
    assert (None if message is None else exit_status(message)) == status
    # A launcher sees the same status on every rank.
    assert status is None or exit_status(caught.value) == status


@pytest.mark.parametrize(("error", "status", "reported"), [
    (RankInputError("a world of 1", "one of 2", "another MPI"), 2, True),
    (RankError("nobody came"), 1, True), (InputError("a", "b", "c"), 2, False)])
def test_another_rank_than_0_reports_only_what_it_has_no_peers_for(error, status, reported,
                                                                   monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("amid_ds.training.train.run_training", fail)
    assert main(["train", "r.yaml"]) == status
    assert (str(error).splitlines()[0] in capsys.readouterr().err) == reported


def test_an_error_says_where_in_the_package_it_arose(tmp_path):
    with pytest.raises(OSError) as caught:
        replace_text(tmp_path / "nowhere" / "file", "")
    assert "(files/atomic.py:" in str(expected_error(caught.value))


def test_an_error_of_a_library_in_rust_is_known_by_its_number():
    error = Exception("No space left on device (os error 28)")
    assert "the disk is full" in str(expected_error(error))
