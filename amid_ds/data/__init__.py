"""The user's files as micro-batches.

    locate, readers, tables, sources   files to rows of text
    chat                      conversations to text
    tokenizer, joints, encode text to token ids
    pack, shard, preparation  token ids to rows of seq_length in a prepared folder
    manifest, prepared        the JSON of that folder, and its rows by number
    order, batch, loader      rows to the micro-batches of each step and rank
    arrow_shard, target_shard, targets, target_work
                              a teacher's distributions over the rows, written down
    epochs                    how often rows are read, and how many steps that is
    stream                    the same without preparation, from data sets too large for the disk
"""

from amid_ds.data.batch import Batch
from amid_ds.data.epochs import planned_epochs, with_steps
from amid_ds.data.loader import PreparedLoader, StepLoader
from amid_ds.data.preparation import PreparedInfo, SourceInfo, prepare, prepare_all
from amid_ds.data.prepared import PreparedDataset, read_batches
from amid_ds.data.sources import (
    check_sources,
    read_prompts,
    read_prompts_with_references,
    sample_texts,
    source_columns,
)
from amid_ds.data.stream import StreamLoader, StreamState, merge_stream_states, stream_summary
from amid_ds.data.targets import RowTargets, TargetFolder, TargetManifest, stack_targets
from amid_ds.data.tokenizer import (
    encode_prompts,
    end_of_text_id,
    load_tokenizer,
    require_same_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_sentencepiece,
    vocabulary_size,
)

__all__ = ["Batch", "PreparedDataset", "PreparedInfo", "PreparedLoader", "RowTargets",
           "SourceInfo", "StepLoader", "StreamLoader", "StreamState", "TargetFolder",
           "TargetManifest", "check_sources", "encode_prompts",
           "end_of_text_id", "load_tokenizer", "merge_stream_states", "planned_epochs", "prepare",
           "prepare_all", "read_batches", "read_prompts", "read_prompts_with_references",
           "require_same_tokenizer", "sample_texts", "save_tokenizer", "source_columns",
           "stack_targets", "stream_summary", "tokenizer_fingerprint", "train_sentencepiece",
           "vocabulary_size", "with_steps"]
