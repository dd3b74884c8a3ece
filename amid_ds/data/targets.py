"""The folder of a teacher's distributions over prepared data: what it is of, and its rows.

    plan.json             all that the shards' bytes depend on; written first
    shards/000000.json    counts and checksum of one shard; written after its .arrow file
    manifest.json         the plan and every shard; written last, so it marks completion

Rows have the numbers of the prepared data's, and every shard but the last has as many, so a row is
found without a search. Of each the labelled positions alone are kept, in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# Checking needs it before Python 3.12.
from typing_extensions import TypedDict

from amid_ds.data.arrow_shard import (
    OPEN_SHARDS,
    damaged_shard,
    require_shard_checksum,
    require_shard_size,
)
from amid_ds.data.manifest import (
    PREPARED_MANIFEST,
    PREPARED_PLAN,
    damaged_json,
    read_typed,
    shard_path,
)
from amid_ds.data.target_shard import SelectedRow, TargetLayout, TargetShard
from amid_ds.errors import InputError
from amid_ds.losses.sparse import Rest, SparseTargets

TARGET_FORMAT = 1


@dataclass(frozen=True)
class TargetManifest:
    """What a folder of targets is of: all that its bytes depend on.

    method: `topk` keeps the k most probable ids, `sample` as many `draws` with a probability ∝
        p^exponent; seed: of the draws.
    vocab_size: the ids that p is over, those of the tokenizer; rows, positions: of the prepared
        data, and their labelled ones; shard_rows: of every shard but the last.
    data_sha256, tokenizer_sha256, teacher_sha256: as a run's identity has them; the last is None
        for a model of the hub, which `teacher` and `revision` name.
    teacher_dtype, micro_batch_size: last digits depend on them.
    """

    format: int
    method: Literal["topk", "sample"]
    k: int | None
    draws: int | None
    exponent: float | None
    seed: int | None
    vocab_size: int
    rows: int
    positions: int
    shard_rows: int
    micro_batch_size: int
    data_sha256: str
    tokenizer_sha256: str
    teacher_sha256: str | None
    teacher: str
    revision: str | None
    teacher_dtype: str

    @property
    def layout(self) -> TargetLayout:
        """The numbers' sizes in its shards."""
        return TargetLayout(self.vocab_size, self.k or self.draws or 0, self.method == "sample")

    @property
    def shards(self) -> int:
        """Their number."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """The numbers of a shard's rows."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.rows))


class TargetShardCounts(TypedDict):
    """The content of one shard's JSON file. plan: the hash of the plan that it was made by."""

    plan: str
    rows: int
    positions: int
    bytes: int
    sha256: str


class TargetFile(TypedDict):
    """The content of a folder's manifest.json."""

    plan: TargetManifest
    shards: list[TargetShardCounts]


class RowTargets(NamedTuple):
    """The targets of a row with n labelled positions, in the order of `Batch.valid`.

    ids: [n, K] int64, each once in a position, -1: no entry; of topk by falling probability.
    log_probabilities: [n, K] fp32, of p over the vocabulary, as they were rounded.
    label_log_probabilities: [n] fp32, of the position's own next token.
    log_rest: [n] fp32, of topk: log of the mass outside; None of sample.
    weights: [n, K] fp32, of sample: E[weight of id x] = p(x); 0 without an entry. None of topk.
    """

    ids: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    label_log_probabilities: NDArray[np.float32]
    log_rest: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None


class TargetFolder:
    """A complete folder of targets: `open` it, then its rows by number."""

    def __init__(self, path: Path, manifest: TargetManifest,
                 shards: Sequence[TargetShardCounts]) -> None:
        self.path, self.manifest, self._shards = path, manifest, shards
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._mapped)

    @classmethod
    def open(cls, path: str | Path) -> TargetFolder:
        """The folder `path`. Raises InputError for one that is not complete, or is damaged."""
        folder = Path(path)
        complete = read_target_manifest(folder)
        if complete is None:
            started = (folder / PREPARED_PLAN).exists()
            raise InputError(f"the folder {folder} holds no teacher's distributions"
                             + (": `amid-ds cache` has not finished there" if started else ""),
                             f"a complete one, with {PREPARED_MANIFEST}",
                             "run `amid-ds cache RECIPE --out DIR`, to its end")
        return cls(folder, complete["plan"], complete["shards"])

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def bytes(self) -> int:
        """Of all its shards."""
        return sum(shard["bytes"] for shard in self._shards)

    def require_sizes(self) -> None:
        """Raise InputError unless every shard is there with its size."""
        for number, shard in enumerate(self._shards):
            require_shard_size(target_shard_path(self.path, number), shard["bytes"])

    def require_checksums(self, shards: range) -> None:
        """Raise InputError unless these shards have their SHA-256. Reads the files whole."""
        for number in shards:
            path, counts = target_shard_path(self.path, number), self._shards[number]
            require_shard_size(path, counts["bytes"])
            require_shard_checksum(path, counts["sha256"])

    def row(self, number: int) -> RowTargets:
        """The targets of row `number` of the prepared data, in O(1).

        Raises InputError for a shard that is damaged there.
        """
        shard, row_in_shard = divmod(number, self.manifest.shard_rows)
        try:
            row = self._open(shard).row(row_in_shard)
        except InputError:
            raise
        except Exception as error:
            # Damaged bytes end pyarrow with anything.
            raise damaged_shard(target_shard_path(self.path, shard), str(error)) from None
        return RowTargets(row.ids, row.log_p, row.label_log_p, row.log_rest,
                          _weights(row, self.manifest))

    def _mapped(self, shard: int) -> TargetShard:
        return TargetShard(target_shard_path(self.path, shard), self._shards[shard]["bytes"],
                           self.manifest.layout)


def _weights(row: SelectedRow, manifest: TargetManifest) -> NDArray[np.float32] | None:
    """counts / draws · p / proposal, with proposal = p^s / Σ p^s; None of topk. At s = 1 they are
    those of arXiv 2503.16870."""
    if row.counts is None or row.log_proposal_sum is None:
        return None
    assert manifest.draws is not None and manifest.exponent is not None
    share = row.counts / manifest.draws
    if manifest.exponent == 1:
        return share.astype(np.float32)
    # p of no entry is 0, and so is its count.
    log_p = np.where(row.counts > 0, row.log_p, 0).astype(np.float64)
    log_ratio = (1 - manifest.exponent) * log_p + row.log_proposal_sum[:, None]
    return (share * np.exp(log_ratio)).astype(np.float32)


def stack_targets(rows: Sequence[RowTargets], rest: Rest | None = None) -> SparseTargets:
    """The targets of all positions of the rows, in order, for `linear_amid_loss`.

    rest: see SparseTargets, and its default. Positions with fewer entries than others get entries
    of no id. Of topk what rounding has left over of the total of 1 is taken back: every probability
    of a position is divided by their sum.
    """
    def tensor(values: NDArray[Any] | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values)

    stacked = SparseTargets.concatenate([SparseTargets(
        torch.from_numpy(row.ids), torch.from_numpy(row.log_probabilities), tensor(row.log_rest),
        tensor(row.weights), tensor(row.label_log_probabilities), rest) for row in rows])
    log_p, log_rest = stacked.log_probabilities, stacked.log_rest
    if log_rest is None:
        return stacked
    total = torch.cat([log_p, log_rest[:, None]], 1).logsumexp(1)
    return replace(stacked, log_probabilities=log_p - total[:, None], log_rest=log_rest - total)


def read_target_manifest(folder: Path) -> TargetFile | None:
    """The manifest of a folder of targets, or None while it has none. Raises InputError."""
    path = folder / PREPARED_MANIFEST
    found = read_typed(path, TargetFile, TARGET_FORMAT)
    if found is None:
        return None
    manifest = _as_manifest(path, found["plan"])
    if [shard["rows"] for shard in found["shards"]] != [
            len(manifest.shard_range(number)) for number in range(manifest.shards)]:
        raise damaged_json(path, "its shards do not add up to its rows")
    return {"plan": manifest, "shards": found["shards"]}


def read_target_plan(folder: Path) -> TargetManifest | None:
    """The plan that a folder's shards are made by, or None in a folder without one."""
    path = folder / PREPARED_PLAN
    found = read_typed(path, TargetManifest, TARGET_FORMAT)
    return None if found is None else _as_manifest(path, found)


def _as_manifest(path: Path, plan: object) -> TargetManifest:
    """The plan that was read as JSON. Raises InputError for prepared data's, another version's."""
    assert isinstance(plan, dict)
    if "method" not in plan:
        raise InputError(f"{path.parent} holds prepared data, and no teacher's distributions",
                         "a folder that `amid-ds cache` wrote", "name another folder")
    if plan["format"] != TARGET_FORMAT:
        raise InputError(f"{path.parent} was written by another version of amid-ds: its format is "
                         f"{plan['format']}, this version's {TARGET_FORMAT}",
                         "a folder that this version wrote", "name another folder")
    return TargetManifest(**{field.name: plan[field.name] for field in fields(TargetManifest)})


def plan_json(manifest: TargetManifest) -> dict[str, object]:
    """The content of plan.json."""
    return asdict(manifest)


def target_shard_path(folder: Path, shard: int) -> Path:
    """The Arrow file of a shard of a folder of targets."""
    return shard_path(folder, f"{shard:06d}")
