"""The folder of a teacher's distributions: its bytes, its rows, who may write and read it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from amid_ds.config.parse import source_of
from amid_ds.config.recipe import Data
from amid_ds.data import load_tokenizer, prepare_all
from amid_ds.data.target_shard import (
    ROW_BYTES,
    SelectedRow,
    encode_targets,
    write_target_rows,
)
from amid_ds.data.target_work import TargetWork
from amid_ds.data.targets import TargetFolder, TargetManifest, stack_targets, target_shard_path
from amid_ds.errors import InputError

LENGTHS = [3, 0, 5, 1, 4, 2, 7]


def manifest(method="topk", size=4, vocab=500, **changes):
    sampled = method == "sample"
    plan = TargetManifest(
        format=1, method=method, k=None if sampled else size, draws=size if sampled else None,
        exponent=0.8 if sampled else None, seed=7 if sampled else None, vocab_size=vocab,
        rows=len(LENGTHS), positions=sum(LENGTHS), shard_rows=2, micro_batch_size=1,
        data_sha256="d", tokenizer_sha256="t", teacher_sha256=None, teacher="org/model",
        revision="abc", teacher_dtype="fp32")
    return replace(plan, **changes)


def truth(plan, seed=0):
    """By row: log p [n, V] in float64, next tokens [n], ids kept [n, K], counts or None."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in LENGTHS:
        log_p = rng.normal(size=(n, plan.vocab_size)) * 4
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        labels = rng.integers(plan.vocab_size, size=n)
        if plan.method == "topk":
            rows.append((log_p, labels, np.argsort(-log_p, -1)[:, :plan.k], None))
            continue
        ids = np.full((n, plan.draws), -1)
        counts = np.zeros((n, plan.draws), np.int64)
        for i in range(n):
            proposal = np.exp(plan.exponent * log_p[i])
            drawn = rng.choice(plan.vocab_size, plan.draws, p=proposal / proposal.sum())
            own, often = np.unique(drawn, return_counts=True)
            ids[i, :len(own)], counts[i, :len(own)] = own, often
        rows.append((log_p, labels, ids, counts))
    return rows


def selected(plan, row):
    log_p, labels, ids, counts = row
    kept = np.where(ids >= 0, np.take_along_axis(log_p, ids.clip(0), -1), -np.inf)
    label = np.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    if plan.method == "topk":
        with np.errstate(divide="ignore"):
            rest = np.log(np.maximum(1 - np.exp(kept).sum(-1), 0))
        return SelectedRow(ids, kept, label, log_rest=rest)
    scale = np.log(np.exp(plan.exponent * log_p).sum(-1))
    return SelectedRow(ids, kept, label, counts=counts, log_proposal_sum=scale)


def write(folder, plan, rows):
    work = TargetWork(folder, plan)
    assert work.start()
    encoded = [encode_targets(selected(plan, row), plan.layout) for row in rows]
    while (shard := work.claim(wait=True)) is not None:
        work.finish(shard, [encoded[number] for number in plan.shard_range(shard)])
    work.publish()
    return TargetFolder.open(folder)


@pytest.mark.parametrize("vocab", [200, 500, 128256])
@pytest.mark.parametrize("method", ["topk", "sample"])
def test_every_row_comes_back_with_its_ids_and_log_probabilities_within_the_stated_error(
        method, vocab, tmp_path):
    plan = manifest(method, 6, vocab)
    rows = truth(plan)
    folder = write(tmp_path / "cache", plan, rows)
    assert len(folder) == len(LENGTHS) and folder.manifest == plan
    for number in np.random.default_rng(1).permutation(len(rows)).tolist():
        log_p, labels, ids, counts = rows[number]
        found = folder.row(number)
        widest = found.ids.shape[1]
        assert (found.ids == ids[:, :widest]).all() and (ids[:, widest:] == -1).all()
        there = found.ids >= 0
        expected = np.take_along_axis(log_p, found.ids.clip(0), -1)
        error = np.abs(found.log_probabilities - expected)[there]
        assert (error <= np.abs(expected[there]) * 2**-11 + 1e-7).all()
        label = np.take_along_axis(log_p, labels[:, None], -1)[:, 0]
        assert (np.abs(found.label_log_probabilities - label) <= np.abs(label) * 2**-11).all()
        if method == "sample":
            proposal = np.exp(plan.exponent * log_p)
            proposal /= proposal.sum(-1, keepdims=True)
            ratio = np.take_along_axis(np.exp(log_p) / proposal, found.ids.clip(0), -1)
            weights = counts[:, :widest] / plan.draws * ratio
            assert np.allclose(found.weights[there], weights[there], rtol=2e-3)
            assert (found.weights[~there] == 0).all() and found.log_rest is None
        else:
            rest = 1 - np.exp(log_p)[np.arange(len(ids))[:, None], ids].sum(-1)
            assert np.allclose(np.exp(found.log_rest), rest, rtol=4e-3) and found.weights is None


def test_the_whole_vocabulary_is_kept_without_rounding(tmp_path):
    plan = manifest(size=50, vocab=50)
    rows = truth(plan)
    folder = write(tmp_path / "cache", plan, rows)
    for number, (log_p, _, ids, _) in enumerate(rows):
        expected = np.take_along_axis(log_p, ids, -1).astype(np.float32)
        assert (folder.row(number).log_probabilities == expected).all()


@pytest.mark.parametrize(("method", "vocab", "expected"), [
    # 1 or 2 bytes of ids and a bit each above 16; 2 of log p; rest and label, 2 each.
    ("topk", 200, 8 * 3 + 4), ("topk", 500, 8 * 4 + 4), ("topk", 128256, 8 * 4 + 1 + 4),
    ("topk", 151936, 8 * 4 + 2 + 4),
    # One byte more of a count; a count of ids, the label, a number of 4 bytes.
    ("sample", 128256, 8 * 5 + 1 + 1 + 2 + 4)])
def test_a_position_takes_the_bytes_that_are_said(method, vocab, expected):
    plan = manifest(method, 8, vocab)
    assert plan.layout.position_bytes == expected
    n = 400
    row = SelectedRow(np.tile(np.arange(8), (n, 1)) + vocab - 8, np.zeros((n, 8)), np.zeros(n),
                      *((None, np.ones((n, 8), int), np.zeros(n)) if method == "sample"
                        else (np.zeros(n),)))
    assert sum(column.nbytes for column in encode_targets(row, plan.layout)) == n * expected


def test_a_row_takes_the_bytes_that_are_said_beside_its_positions(tmp_path):
    layout = manifest(size=8).layout
    row = encode_targets(SelectedRow(np.tile(np.arange(8), (8, 1)), np.zeros((8, 8)), np.zeros(8),
                                     np.zeros(8)), layout)
    sizes = []
    for count in (640, 1280):
        write_target_rows(tmp_path / str(count), [row] * count, layout)
        sizes.append((tmp_path / str(count)).stat().st_size)
    assert (sizes[1] - sizes[0]) / 640 == pytest.approx(8 * layout.position_bytes + ROW_BYTES,
                                                        abs=0.5)


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_rows_stack_into_the_positions_of_a_batch_in_order(method, tmp_path):
    plan = manifest(method, 6)
    folder = write(tmp_path / "cache", plan, truth(plan))
    rows = [folder.row(number) for number in (4, 1, 2)]
    targets = stack_targets(rows)
    n = LENGTHS[4] + LENGTHS[1] + LENGTHS[2]
    widest = max(row.ids.shape[1] for row in rows)
    assert targets.ids.shape == targets.log_probabilities.shape == (n, widest)
    assert targets.ids.dtype == torch.int64 and targets.log_probabilities.dtype == torch.float32
    assert targets.ids[4, :rows[2].ids.shape[1]].tolist() == rows[2].ids[0].tolist()
    assert targets.label_log_probabilities.shape == (n,)
    if method == "topk":
        assert targets.rest == "ghost" and targets.weights is None
        total = torch.cat([targets.log_probabilities, targets.log_rest[:, None]], 1).exp().sum(1)
        assert torch.allclose(total, torch.ones(n), atol=1e-6)
        assert torch.allclose(targets.log_probabilities[4:].exp(),
                              torch.from_numpy(rows[2].log_probabilities).exp(), rtol=5e-3)
    else:
        assert targets.rest == "drop" and targets.log_rest is None
        assert (targets.weights[targets.ids < 0] == 0).all()
    assert stack_targets(rows, "drop").rest == "drop"


def test_a_damaged_shard_is_named_with_the_way_to_make_it_anew(tmp_path):
    plan = manifest()
    rows = truth(plan)
    write(tmp_path, plan, rows)
    path = target_shard_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    place = content.index(folder_bytes(plan, rows[2]))
    content[place] ^= 1
    path.write_bytes(content)
    folder = TargetFolder.open(tmp_path)
    folder.row(0)
    with pytest.raises(InputError, match=r"000001\.arrow is damaged: the checksum of its row 0"):
        folder.row(2)
    path.write_bytes(content[:-8])
    with pytest.raises(InputError, match=r"it has .* bytes of"):
        TargetFolder.open(tmp_path).require_sizes()
    path.with_suffix(".json").unlink()
    (tmp_path / "manifest.json").unlink()
    assert (write(tmp_path, plan, rows).row(2).ids == rows[2][2]).all()


def folder_bytes(plan, row):
    """What the row's log-probabilities are in the file."""
    return encode_targets(selected(plan, row), plan.layout)[2].tobytes()


@pytest.mark.parametrize(("name", "value"), [
    ("teacher_sha256", "other"), ("data_sha256", "other"), ("tokenizer_sha256", "other"),
    ("k", 5), ("micro_batch_size", 2)])
def test_a_folder_of_something_else_is_refused_with_what_differs(name, value, tmp_path):
    plan = manifest()
    write(tmp_path, plan, truth(plan))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"`{name}` is .* there and {value!r}"):
        TargetWork(tmp_path, replace(plan, **{name: value})).start()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_that_is_not_ours_is_neither_written_nor_read(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not amid-ds's own: it holds thesis\.txt"):
        TargetWork(tmp_path, manifest()).start()
    with pytest.raises(InputError, match="holds no teacher's distributions"):
        TargetFolder.open(tmp_path)


def test_a_folder_of_prepared_data_is_called_that(text_file, tokenizer_folder, tmp_path):
    data = Data(train=[source_of({"path": str(text_file)})])
    prepare_all(data, 16, load_tokenizer(str(tokenizer_folder)), tmp_path / "data")
    for use in (TargetWork(tmp_path / "data", manifest()).start,
                lambda: TargetFolder.open(tmp_path / "data")):
        with pytest.raises(InputError, match="holds prepared data, and no teacher's"):
            use()


def test_an_unfinished_folder_is_not_opened(tmp_path):
    assert TargetWork(tmp_path, manifest()).start()
    with pytest.raises(InputError, match="has not finished there"):
        TargetFolder.open(tmp_path)


def test_two_jobs_share_the_shards_and_write_the_same_bytes_as_one(tmp_path):
    plan = manifest()
    rows = truth(plan)
    write(tmp_path / "one", plan, rows)
    encoded = [encode_targets(selected(plan, row), plan.layout) for row in rows]
    jobs = [TargetWork(tmp_path / "two", plan) for _ in range(2)]
    assert all(job.start() for job in jobs)
    made = [[], []]
    claimed = [job.claim(wait=False) for job in jobs]
    while any(shard is not None for shard in claimed):
        assert claimed[0] != claimed[1]
        for number, (job, shard) in enumerate(zip(jobs, claimed, strict=True)):
            if shard is not None:
                made[number].append(shard)
                job.finish(shard, [encoded[row] for row in plan.shard_range(shard)])
        claimed = [job.claim(wait=False) for job in jobs]
    assert sorted(made[0] + made[1]) == [0, 1, 2, 3] and all(made)
    for job in jobs:
        job.publish()
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*")
                 if path.is_file()} for name in ("one", "two")]
    assert contents[0] == contents[1]
