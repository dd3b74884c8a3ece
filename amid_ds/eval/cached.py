"""`amid-ds eval MODEL --cached DIR`: the teacher's part of the scores, from a cache of its own.

No teacher runs, so a model is compared with a teacher of any size on the machine that holds the
model. The rows that are scored are those that the cache is of: a prepared folder, or a file that
makes the same rows. What a cache keeps is a part of the teacher's distribution, and each score says
what it is of that; it is written independently of the fused loss, as evaluate.py is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from amid_ds.config.parse import source_of
from amid_ds.config.recipe import Data
from amid_ds.data import Batch, TargetFolder, check_sources, tokenizer_fingerprint
from amid_ds.data.loader import with_targets
from amid_ds.data.manifest import PREPARED_MANIFEST, read_prepared_manifest
from amid_ds.errors import InputError
from amid_ds.eval.protocol import EvalProtocol
from amid_ds.eval.rows import RowOptions
from amid_ds.losses import SparseTargets
from amid_ds.run.provenance import prepared_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from amid_ds.eval.protocol import EvalArgs


def cache_to_score(args: EvalArgs, tokenizer: PreTrainedTokenizerBase) -> TargetFolder | None:
    """The cache of `--cached`, None without. Raises InputError for one of another tokenizer."""
    if args.cached is None:
        return None
    cache = TargetFolder.open(Path(args.cached))
    if cache.manifest.tokenizer_sha256 != tokenizer_fingerprint(tokenizer):
        raise InputError(f"{args.model} has another tokenizer than the teacher of {args.cached}",
                         "the tokenizer that the cache was written with",
                         "score a student of that teacher")
    return cache


def prepared_folder(args: EvalArgs) -> Path | None:
    """The folder of prepared data that `--data` is; None for any other, whose rows are to be made.
    """
    folder = Path(args.data)
    return folder if args.cached is not None and (folder / PREPARED_MANIFEST).is_file() else None


def check_eval_data(args: EvalArgs) -> None:
    """Raise InputError for two teachers, or for data that cannot be read."""
    if args.cached is not None and args.teacher is not None:
        raise InputError("both --teacher and --cached", "one teacher", "leave one of them out")
    folder = prepared_folder(args)
    if folder is None:
        check_sources(args.rows.data(args.data))
        return
    manifest = read_prepared_manifest(folder)
    assert manifest is not None
    asked, length = args.protocol.seq_length, manifest["plan"]["seq_length"]
    if args.rows != RowOptions() or asked not in (length, EvalProtocol.seq_length):
        raise InputError(f"--data {args.data}, whose rows are prepared, with options that say how "
                         f"to make some: of which columns, or --seq-length {asked}",
                         f"its rows as they are, of at most {length} tokens",
                         "leave these options out, or name the file")


def rows_to_score(args: EvalArgs) -> Data:
    """The source that `--data` is; of a prepared folder nothing but its name is used."""
    if prepared_folder(args) is not None:
        return Data(train=[source_of({"path": args.data})])
    return args.rows.data(args.data)


def require_same_rows(cache: TargetFolder | None, rows: Path, data: str) -> None:
    """Raise InputError unless the prepared `rows`, of `--data`, are those of the cache."""
    if cache is None or cache.manifest.data_sha256 == prepared_hash(rows):
        return
    manifest = read_prepared_manifest(rows)
    assert manifest is not None
    found = sum(source["rows"] for source in manifest["sources"])
    raise InputError(
        f"{data} makes {found} rows of at most {manifest['plan']['seq_length']} tokens, and the "
        f"cache {cache.path} is of others: {cache.manifest.rows} rows",
        "the rows that the cache was written for",
        "give the prepared folder of its recipe, or its only file with the same --seq-length and "
        "columns")


def with_cached_targets(batches: Iterable[Batch], cache: TargetFolder | None) -> Iterator[Batch]:
    """The batches with what the cache holds of the teacher at their rows, where they have some."""
    for batch in batches:
        yield batch if cache is None or not batch.rows else with_targets(batch, cache)


def kl_from(targets: SparseTargets, log_q: torch.Tensor) -> torch.Tensor:
    """Σ over the tokens of KL(teacher ‖ model) in nats, as far as the targets tell.

    log_q: [n, V] log-probabilities. topk: of K + 1 classes, the last being all other ids, which is
    at most the whole divergence; sample: Σ w (log p - log q), whose mean over the draws it is.
    """
    kept = targets.ids >= 0
    own = log_q.double().gather(1, targets.ids.clamp(min=0))
    log_p = targets.log_probabilities.double()
    if targets.weights is not None:
        terms = targets.weights.double() * (log_p - own)
        return torch.where(kept & (targets.weights > 0), terms, 0.0).sum()
    assert targets.log_rest is not None
    # A column more, for the places without an id.
    others = F.pad(log_q.double().exp(), (0, 1))
    outside = others.scatter(1, torch.where(kept, targets.ids, log_q.shape[1]), 0.0).sum(1)
    log_rest = targets.log_rest.double()
    rest = torch.where(log_rest == -torch.inf, 0.0, log_rest.exp() * (log_rest - outside.log()))
    return torch.where(kept & (log_p > -torch.inf), log_p.exp() * (log_p - own), 0.0).sum() \
        + rest.sum()


def agreed_from(targets: SparseTargets, choice: torch.Tensor) -> torch.Tensor:
    """The number of tokens at which the model's first choice [n] is the most probable id kept."""
    best = targets.log_probabilities.masked_fill(targets.ids < 0, -torch.inf).argmax(1)
    return (targets.ids.gather(1, best[:, None])[:, 0] == choice).sum()
