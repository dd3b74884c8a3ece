"""Rows longer than a model's table of positions are refused by every command; a rotary model has no
such table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from support.data import write_texts
from support.models import make_model
from support.runs import write_recipe

from amid_ds.cli import main
from amid_ds.models.fit import table_of_positions

SIZES = dict(vocab_size=50, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=16)
# With the number of positions that the model has a table for.
NAMES = dict(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16)
MODELS = {
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**NAMES), 16),
    "gpt-neo": (t.GPTNeoForCausalLM,
                t.GPTNeoConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4,
                               attention_types=[[["global"], 1]], max_position_embeddings=16), 16),
    # Two rows before the first position.
    "opt": (t.OPTForCausalLM, t.OPTConfig(**SIZES, hidden_size=32, ffn_dim=64,
                                          word_embed_proj_dim=32), 16),
    # A table of sines.
    "gpt-j": (t.GPTJForCausalLM, t.GPTJConfig(**NAMES, rotary_dim=4), 16),
    "ctrl": (t.CTRLLMHeadModel, t.CTRLConfig(**NAMES, dff=64), 16),
    # Biases by distance.
    "mpt": (t.MptForCausalLM,
            t.MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=1, max_seq_len=16), 16),
    # Computed; a hidden size equal to the positions is no table.
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES, hidden_size=16, intermediate_size=16),
              None),
    "bloom": (t.BloomForCausalLM,
              t.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_table_of_positions_is_found_where_a_longer_row_fails(name):
    model_class, config, limit = MODELS[name]
    with torch.device("meta"):
        assert table_of_positions(model_class(config)) == limit
    model = model_class(config)
    with torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long))
        if limit is None:
            model(torch.zeros(1, 17, dtype=torch.long))
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.zeros(1, 17, dtype=torch.long))


def test_longer_rows_are_refused_by_plan_train_and_eval(tmp_path, shared_model, capsys):
    short = make_model(tmp_path / "short", "gpt2", n_positions=16)
    texts = write_texts(tmp_path / "t.jsonl", rows=20)

    def recipe(student: Path, teacher: Path) -> str:
        return str(write_recipe(tmp_path / "r.yaml", student, teacher, texts, tmp_path / "run"))

    long = shared_model("llama", 0)
    for command in (["plan", recipe(short, long), "--device", "cpu"],
                    ["plan", recipe(long, short), "--device", "cpu"],
                    ["train", recipe(short, long)], ["train", recipe(long, short)],
                    ["eval", str(short), "--data", str(texts), "--seq-length", "24"],
                    ["eval", str(long), "--teacher", str(short), "--data", str(texts),
                     "--seq-length", "24"]):
        assert main(command) == 2, command
        message = capsys.readouterr().err
        assert "rows of 24 tokens" in message and f"{short} has 16 positions" in message
        assert "Traceback" not in message
    assert not (tmp_path / "run").exists()
    for length in ("16", "12"):
        assert main(["eval", str(short), "--data", str(texts), "--seq-length", length]) == 0
