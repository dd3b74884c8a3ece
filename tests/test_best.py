"""The best evaluation of a run: measured, saved, kept over resumes, exported, and the early end."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rouge_score import rouge_scorer
from support.data import write_instructions
from support.ranks import run_ranks
from support.runs import comparable_results, read_metrics, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.checkpoint.best import best_candidates, updated_best
from amid_ds.checkpoint.manifest import Manifest, list_checkpoints
from amid_ds.checkpoint.state import TrainState
from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Best
from amid_ds.errors import InputError
from amid_ds.run.folder import RunFolder
from amid_ds.training.selection import Selection

NEW = 6
GREEDY = {"max_new_tokens": NEW, "temperature": 0, "batch_size": 3, "rows": 7}
BEST = {"metric": "eval.held.rouge_l", "mode": "max", "patience": 3}


@pytest.fixture(scope="module")
def recipe_for(llama_pair, instructions_file, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, **changes): evaluates and samples at each step, saves the best ones alone."""
    folder = tmp_path_factory.mktemp("best")
    held = write_instructions(folder / "held.jsonl", rows=9, seed=5)
    evaluated = {"path": str(held), "prompt": "prompt", "response": "response", "generate": GREEDY}

    def write(run: Path, **changes) -> Path:
        settings = {"data__prepared": str(folder / "data"), "data__eval": [evaluated],
                    "train__eval_every": 1, "train__steps": 12, "train__learning_rate": 0.05,
                    "train__warmup_steps": 0,
                    "checkpoint": {"every": 100, "best": BEST}, **changes}
        return write_recipe(run.with_suffix(".yaml"), *llama_pair, instructions_file, run,
                            **settings)
    return write
