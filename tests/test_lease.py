"""One writer at a time: who is refused, who takes over, and what a replaced one may still write."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.ranks import Ranks
from support.runs import count_steps, read_metrics, write_recipe

from amid_ds.errors import InputError
from amid_ds.files import lease as leases
from amid_ds.files.lease import Holder, Lease, LeaseLostError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lease.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    for name, value in (("BEAT_S", 0.1), ("STALE_S", 1.5), ("WATCH_S", 0.05)):
        monkeypatch.setattr(leases, name, value)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    """Another process on this machine."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def holder_of(pid: int) -> Holder:
    return replace(Holder.this_process(), pid=pid, started=leases.process_start_ticks(pid),
                   token="other")


def write(path: Path, holder: Holder) -> str:
    text = json.dumps(asdict(holder))
    path.write_text(text)
    return text


def elsewhere(**changes: object) -> Holder:
    return replace(Holder.this_process(), host="elsewhere", machine="another", token="other",
                   **changes)


def test_it_says_who_works_and_is_gone_afterwards(path):
    with Lease.held(path, "the run R"):
        said = json.loads(path.read_text())
        assert {"host", "pid", "job", "restart", "token", "heartbeat"} <= said.keys()
        first = path.stat().st_mtime_ns
        with pytest.raises(InputError, match="the run R is in use by process"):
            Lease.take(path, "the run R")
        deadline = time.monotonic() + 30
        while path.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.02)
    assert not path.exists()


def test_a_living_process_is_not_replaced_and_a_killed_one_at_once(path, process, monkeypatch):
    text = write(path, holder_of(process.pid))
    with pytest.raises(InputError, match=f"process {process.pid} on"):
        Lease.take(path, "it")
    assert path.read_text() == text
    monkeypatch.setattr(leases, "STALE_S", 3600.0)
    # A zombie first: nobody has waited for it yet.
    process.kill()
    deadline = time.monotonic() + 30
    while leases.process_start_ticks(process.pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Lease.take(path, "it").release()
    process.wait()
    write(path, holder_of(process.pid))
    Lease.take(path, "it").release()


def test_a_process_id_that_another_process_has_now_is_no_sign_of_life(path, process, monkeypatch):
    monkeypatch.setattr(leases, "STALE_S", 3600.0)
    write(path, replace(holder_of(process.pid), started=1))
    Lease.take(path, "it").release()


def test_one_of_another_machine_is_refused_while_its_heartbeat_moves_whatever_the_clocks(path):
    # Its clock is a year behind.
    holder = elsewhere(heartbeat=int(time.time()) - 365 * 86400)
    write(path, holder)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.2):
            number += 1
            write(path, replace(holder, heartbeat=holder.heartbeat + number))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="on elsewhere"):
            Lease.take(path, "it")
    finally:
        ended.set()
        thread.join()
    assert json.loads(path.read_text())["token"] == "other"


# A holder whose clock is ahead; and what a power failure leaves.
@pytest.mark.parametrize("content", [asdict(elsewhere(heartbeat=1 << 33)), "", "\0" * 80],
                         ids=["whole", "empty", "zeros"])
def test_one_of_another_machine_that_stands_still_is_taken_over(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with Lease.held(path, "it") as lease:
        assert json.loads(path.read_text())["token"] == lease.holder.token
        lease.check()


def test_a_later_restart_of_the_same_job_is_never_locked_out(path, process, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    # The node was cut off: its process still lives.
    for holder in (replace(holder_of(process.pid), job="77", restart=0),
                   elsewhere(job="77", restart=0)):
        write(path, holder)
        Lease.take(path, "it").release()
    write(path, replace(holder_of(process.pid), job="77", restart=1))
    with pytest.raises(InputError, match="Slurm job 77"):
        Lease.take(path, "it")
    write(path, replace(holder_of(process.pid), job="78", restart=0))
    with pytest.raises(InputError, match="Slurm job 78"):
        Lease.take(path, "it")


def test_a_replaced_holder_commits_nothing_and_leaves_the_others_lease(path):
    lease = Lease.take(path, "the run R")
    path.unlink()
    path.write_text("something else\n")
    with pytest.raises(LeaseLostError, match="an unknown process"):
        lease.check()
    path.unlink()
    with pytest.raises(LeaseLostError, match="is gone"):
        lease.check()
    text = write(path, elsewhere())
    with pytest.raises(LeaseLostError, match=r"the run R is no longer.*on elsewhere"):
        lease.check()
    # Some heartbeats.
    time.sleep(0.5)
    lease.release()
    assert path.read_text() == text


def test_a_start_on_a_full_disk_leaves_no_lease_and_a_full_disk_later_ends_nothing(path,
                                                                                   monkeypatch):
    def no_room(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(leases.os, "pwrite", no_room)
        with pytest.raises(InputError, match="No space left"):
            Lease.take(path, "it")
        assert not path.exists()
    with Lease.held(path, "it") as lease:
        monkeypatch.setattr(leases.os, "pwrite", no_room)
        # Some heartbeats.
        time.sleep(0.4)
        lease.check()
    assert not path.exists()


def test_a_file_of_that_name_that_is_no_lease_is_left_alone(path):
    path.write_text("my own lease\n")
    with pytest.raises(InputError, match="is not a lease"):
        Lease.take(path, "it")
    assert path.read_text() == "my own lease\n"


def test_of_many_at_once_one_gets_it_also_over_a_dead_ones_lease(path, process):
    process.kill()
    process.wait()
    for _ in range(5):
        write(path, holder_of(process.pid))
        got: list[Lease] = []

        def take(got: list[Lease] = got) -> None:
            with contextlib.suppress(InputError):
                got.append(Lease.take(path, "it"))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()


def test_a_start_that_is_overtaken_by_another_leaves_it_the_lease(path, process, monkeypatch):
    process.kill()
    process.wait()
    write(path, holder_of(process.pid))
    found_dead, quicker = leases._refuse_if_alive, []

    def overtaken(*arguments: object) -> None:
        found_dead(*arguments)
        monkeypatch.setattr(leases, "_refuse_if_alive", found_dead)
        quicker.append(Lease.take(path, "it"))

    monkeypatch.setattr(leases, "_refuse_if_alive", overtaken)
    with pytest.raises(InputError, match="is in use"):
        Lease.take(path, "it")
    quicker[0].check()
    quicker[0].release()
    assert not list(path.parent.iterdir())


def test_a_start_that_was_killed_while_it_took_over_is_taken_over_too(path, process):
    process.kill()
    process.wait()
    dead = holder_of(process.pid)
    write(path, dead)
    write(path.with_name(f"{path.name}.{dead.token}"), replace(dead, token="another"))
    with Lease.held(path, "it") as lease:
        lease.check()
    assert not list(path.parent.iterdir())


def test_a_second_start_is_refused_and_a_killed_run_goes_on_at_once(llama_pair, text_file,
                                                                    tmp_path):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", llama_pair[0], None, text_file, run,
                          train__steps=100_000, checkpoint__every=2)
    first = Ranks(2, "train", recipe)
    first.wait_until((run / "checkpoints" / "latest").is_file)
    second = Ranks(1, "train", recipe)
    assert second.wait() == [2]
    assert "is in use by process" in second.output() and "Traceback" not in second.output()
    first.signal(signal.SIGKILL)
    first.wait()
    assert (run / "lease.json").exists()
    (run / "STOP").touch()
    third = Ranks(2, "train", recipe)
    assert third.wait() == [75, 75], third.output()
    assert "resumed after step" in third.output()
    assert not (run / "lease.json").exists()
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(("size", "every"), [(1, 3), (2, 100_000)], ids=["save", "log"])
def test_a_run_that_was_taken_over_stops_and_writes_nothing_more(llama_pair, text_file, tmp_path,
                                                                 size, every):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", llama_pair[0], None, text_file, run,
                          train__steps=100_000, checkpoint__every=every)
    ranks = Ranks(size, "train", recipe)
    ranks.wait_until(lambda: count_steps(run) >= 2)
    ranks.signal(signal.SIGSTOP)
    # As a start on another machine does it.
    (run / "lease.json").unlink()
    text = write(run / "lease.json", elsewhere())

    attempts, steps = (run / "attempts.jsonl").read_text(), count_steps(run)
    ranks.signal(signal.SIGCONT)
    assert ranks.wait() == [1] * size
    assert "is no longer this process's" in ranks.output() and "elsewhere" in ranks.output()
    assert "Traceback" not in ranks.output()
    # All ranks end by agreement: none is ended because it waits for rank 0.
    assert not any("was waiting for a rank" in ranks.output(rank) for rank in range(size))
    assert (run / "attempts.jsonl").read_text() == attempts
    # At most the line that was under way when it was stopped.
    assert count_steps(run) <= steps + 1
    assert (run / "lease.json").read_text() == text


def test_a_run_that_was_taken_over_commits_and_removes_no_checkpoint(llama_pair, text_file,
                                                                     tmp_path):
    run = tmp_path / "run"
    # Nothing is logged, so the first thing to be written is a checkpoint.
    recipe = write_recipe(tmp_path / "r.yaml", llama_pair[0], None, text_file, run,
                          train__steps=100_000, train__log_every=50_000, checkpoint__every=3)
    ranks = Ranks(1, "train", recipe)
    ranks.wait_until((run / "checkpoints" / "latest").is_file)
    ranks.signal(signal.SIGSTOP)
    (run / "lease.json").unlink()
    write(run / "lease.json", elsewhere())
    before = {path.name for path in (run / "checkpoints").iterdir()
              if path.name.startswith("step_")}
    ranks.signal(signal.SIGCONT)
    assert ranks.wait(60) == [1]
    after = {path.name for path in (run / "checkpoints").iterdir()
             if path.name.startswith("step_")}
    # At most the commit that was under way when it was stopped.
    assert len(before - after) <= 1 and len(after - before) <= 1
