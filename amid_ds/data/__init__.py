"""From the user's files to micro-batches: sources (rows) -> pack (shards of tokens) -> order and loader (steps)."""

from amid_ds.data.loader import Batch, Prepared, StepData, Steps, epochs_ahead, read_rows
from amid_ds.data.preparation import PreparedInfo, SourceInfo, prepare, prepare_all
from amid_ds.data.sources import answered_prompts_of, check_sources, prompts_of, texts_of
from amid_ds.data.stream import StreamData, merged_places, stream_summary
from amid_ds.data.tokenizer import (
    end_of_text,
    fingerprint,
    load_tokenizer,
    prompt_ids,
    require_same_tokenizer,
    train_sentencepiece,
)

__all__ = ["Batch", "Prepared", "PreparedInfo", "SourceInfo", "StepData", "Steps", "StreamData",
           "answered_prompts_of", "check_sources", "end_of_text", "epochs_ahead", "fingerprint", "load_tokenizer",
           "merged_places", "prepare", "prepare_all", "prompt_ids", "prompts_of", "read_rows", "require_same_tokenizer",
           "stream_summary", "texts_of", "train_sentencepiece"]
