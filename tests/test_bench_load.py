"""`bench load` measures what its table says, by the kernel's own counters."""

from __future__ import annotations

import json
import mmap
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import torch

from amid_ds.bench import load
from amid_ds.bench.kernel_counters import KernelFigures, counting, drop_cached
from amid_ds.bench.local_ranks import on_local_ranks
from amid_ds.distributed.world import World
from amid_ds.experiments.small_models import LlamaSize
from amid_ds.models.loading import open_weights
from amid_ds.models.weight_reader import WeightReader

MB = 1 << 20


def test_reads_of_a_file_are_counted_and_the_counting_itself_is_not(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(8 * MB))
    with counting() as figures, (tmp_path / "weights").open("rb") as opened:
        os.preadv(opened.fileno(), [bytearray(3 * MB)], 5 * MB)
    # /proc/self/io at the end is among them.
    assert 0 <= figures.asked - 3 * MB < 1000


def test_a_mapped_file_is_counted_where_it_came_from_the_disk_and_is_not_anonymous(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(64 * MB))
    drop_cached(path)
    with (path.open("rb") as opened, counting() as figures,
          mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped):
        sum(mapped[::mmap.PAGESIZE])
    assert figures.peak_anonymous < 8 * MB and figures.asked < 1000
    # In memory (tmpfs) nothing comes from a disk, and the bench says so.
    assert figures.disk == 0 or 64 * MB <= figures.disk < 72 * MB
    assert figures.read == max(figures.asked, figures.disk)


def test_the_peak_of_anonymous_memory_is_kept_after_it_is_given_back():
    with counting() as figures:
        with mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for start in range(0, 64 * MB, mmap.PAGESIZE):
                memory[start] = 1
            # Of many samples one comes in time.
            time.sleep(0.2)
        with counting() as after:
            pass
    assert 60 * MB < figures.peak_anonymous < 80 * MB and after.peak_anonymous < 8 * MB


def test_what_a_peer_sends_is_counted_and_neither_files_nor_what_was_sent_before():
    with (socket.create_server(("127.0.0.1", 0)) as server,
          socket.create_connection(server.getsockname()) as peer, server.accept()[0] as own):
        peer.sendall(bytes(1000))
        own.recv(1000, socket.MSG_WAITALL)
        with counting() as figures:
            for _ in range(10):
                peer.sendall(bytes(30_000))
                own.recv(30_000, socket.MSG_WAITALL)
    # Both ends are this process's; the peer's receives nothing.
    assert figures.received == 300_000 and figures.asked < 1000


def both_ways(world: World, folder: Path) -> dict[str, load.RankLoad]:
    return {way: load.measure_way(world, folder, way) for way in load.WAYS}


def test_each_rank_reads_its_own_share_and_from_pretrained_sends_what_rank_0_reads(
        tmp_path, capfd):
    load.save_loaded_models(tmp_path, load.TINY_SIZE)
    share = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")) / 2
    ranks = on_local_ranks(2, "loading", both_ways, tmp_path)
    # The progress of reading would stand before the JSON.
    assert capfd.readouterr().out == ""
    for figures in (rank["ours"].figures for rank in ranks):
        # Config and headers, read by python, and the agreement on them.
        assert share < figures.asked < share + 64_000 and figures.received < 64_000
        # The allocator has some of it beforehand.
        assert share / 2 < figures.peak_anonymous < share + 16 * MB
    theirs = [rank["from_pretrained"] for rank in ranks]
    assert theirs[1].figures.received > 2 * share > 50 * theirs[1].figures.asked
    assert theirs[0].cold_s == theirs[1].cold_s > 0 and theirs[0].warm_s > 0 < theirs[0].cpu_s


def test_the_disk_gives_no_more_than_is_asked_for(tmp_path):
    """The first half of every weight: what follows is not read ahead."""
    load.save_loaded_models(tmp_path, LlamaSize.of_width(512, layers=2))
    for path in (tmp_path / "model").glob("*.safetensors"):
        drop_cached(path)
    with counting() as figures:
        reader = open_weights(str(tmp_path / "model"))
        assert isinstance(reader, WeightReader)
        halves = [(source, 0, torch.empty(source.numel() // 2, dtype=torch.bfloat16))
                  for source in dict.fromkeys(reader.sources.values())]
        with reader:
            reader.fill(halves)
    size = sum(out.nbytes for _, _, out in halves)
    assert size < figures.asked < size + 64_000
    # A page more at each end of each weight; 0 in memory (tmpfs).
    assert figures.disk < size + 8192 * (len(halves) + 10)


def cost(share: int, seconds: float) -> dict[str, object]:
    return {"read_bytes": [share] * 2, "disk_bytes": [share] * 2, "received_bytes": [0] * 2,
            "peak_anonymous_bytes": [share] * 2, "cpu_seconds": [1.0] * 2, "seconds": seconds,
            "warm_seconds": seconds, "spread_s": [(1.0, 2.0)] * 2}


def test_each_goal_is_judged_by_the_worst_rank():
    good = load.LoadResult(**cost(500_000_000, 1.0), ranks=2, model_bytes=1_000_000_000,
                           from_pretrained=load.WayCost(**cost(1_000_000_000, 2.0)))
    assert [met for *_, met in load.goals_of(good)] == [True] * 4
    for wrong, change in enumerate([
            {"read_bytes": [1, 510_000_001]}, {"received_bytes": [10**6, 0]},
            {"peak_anonymous_bytes": [0, 700_000_001]}, {"seconds": 1.01}]):
        assert [met for *_, met in load.goals_of(replace(good, **change))] == [
            goal != wrong for goal in range(4)]


def test_json_has_each_ranks_bytes_beside_those_of_from_pretrained(monkeypatch, capsys):
    """The worst of all rounds for bytes, the median of the slowest ranks for seconds."""
    calls = []

    def ranks(size, title, work, folder, way, variables):
        calls.append((size, way))
        count = 100 * len(calls)
        return [load.RankLoad(KernelFigures(count + rank, 7, 5 * rank, count), 1.0, count, 3.0)
                for rank in range(size)]

    monkeypatch.setattr(load, "on_local_ranks", ranks)
    monkeypatch.setattr(load, "LOADED_SIZE", load.TINY_SIZE)
    load.bench_load(True)
    result = json.loads(capsys.readouterr().out)
    order = [(2, "ours"), (2, "from_pretrained"), (4, "ours"), (4, "from_pretrained")]
    assert calls == order * 3
    assert result["ranks"] == 2 and result["read_bytes"] == [900, 901]
    assert result["received_bytes"] == [0, 5] and result["peak_anonymous_bytes"] == [900, 900]
    assert result["seconds"] == 500 and result["warm_seconds"] == 3
    assert result["from_pretrained"]["read_bytes"] == [1000, 1001]
    assert result["at_more_ranks"][0]["ranks"] == 4
    assert len(result["at_more_ranks"][0]["from_pretrained"]["read_bytes"]) == 4
    # The tied embedding and what is in the blocks, in bf16.
    assert 2 * 64 * 32000 < result["model_bytes"] < 2 * (64 * 32000 + 200_000)
    load.bench_load(False, ranks=2)
    shown = capsys.readouterr().out
    assert "from_pretrained" in shown and "page cache could not be dropped" in shown
