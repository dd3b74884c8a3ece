"""Tasks of lm-evaluation-harness on this disk: YAML files, and documents in which words follow
words."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from support.models import WORDS

CHOICE: Mapping[str, Any] = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
GENERATION: Mapping[str, Any] = {
    "output_type": "generate_until", "doc_to_text": "{{question}}",
    "doc_to_target": "{{continuation}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}]}
PERPLEXITY: Mapping[str, Any] = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}]}


def make_documents(number: int) -> list[dict[str, Any]]:
    """Questions with three choices of one to four words, the answer one of them."""
    chance = random.Random(0)

    def words(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))
    return [{"question": words(6), "choices": [words(4) for _ in range(3)],
             "answer": chance.randrange(3)} for _ in range(number)]


def write_task(folder: Path, name: str, kind: Mapping[str, Any],
               documents: Sequence[Mapping[str, Any]]) -> Path:
    """Write a task of this kind and its documents; return the path of its YAML file."""
    folder.mkdir(exist_ok=True)
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    path.write_text(yaml.safe_dump({
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test", **kind}))
    return path
