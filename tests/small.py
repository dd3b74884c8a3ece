"""Small real inputs for the tests: one tokenizer, model folders of several families, corpora; and ways to run."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from amid_ds.distributed.launch import free_port

BIN = Path(sys.executable).parent
WORDS = ("the a one two river stone bird tree house light runs sings falls grows holds over under near with and then "
         "slowly quickly green old small wide red").split()


def make_tokenizer(folder: Path, words: list[str] = WORDS):
    """A word-level tokenizer with unk, eos and pad, saved as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "<pad>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, family: str, seed: int = 0, extra_rows: int = 0, words: list[str] = WORDS,
               dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model folder of `family` with random weights and the tokenizer; `extra_rows` of padding in its vocabulary."""
    import transformers as t

    tokenizer = make_tokenizer(folder, words)
    rope = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=128)
    common = dict(vocab_size=len(tokenizer) + extra_rows, eos_token_id=1, pad_token_id=2, bos_token_id=1)
    kinds = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**rope, "tie_word_embeddings": False}),
        "llama-tied": (t.LlamaForCausalLM, t.LlamaConfig, {**rope, "tie_word_embeddings": True}),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {**rope, "head_dim": 16, "tie_word_embeddings": False}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {**rope, "head_dim": 8, "query_pre_attn_scalar": 8,
                                                     "sliding_window": 8, "final_logit_softcapping": 5.0}),
        "qwen2-tied": (t.Qwen2ForCausalLM, t.Qwen2Config, {**rope, "tie_word_embeddings": True}),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0,
                                                   embd_pdrop=0.0, attn_pdrop=0.0)),
    }
    model_class, config_class, values = kinds[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**values, **common, **changes}))
    for parameter in model.parameters():      # far from uniform predictions, so that losses tell runs apart
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_text(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """jsonl of `text`: sentences of the tokenizer's words, 5 to 40 of them."""
    draw = torch.Generator().manual_seed(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            length = int(torch.randint(5, 40, (), generator=draw))
            ids = torch.randint(len(WORDS), (length,), generator=draw)
            file.write(json.dumps({"text": " ".join(WORDS[i] for i in ids)}) + "\n")
    return path


def make_instructions(path: Path, rows: int = 60, seed: int = 1) -> Path:
    """jsonl of `prompt` and `response`, of unequal lengths, so that masks differ from row to row."""
    draw = torch.Generator().manual_seed(seed)

    def sentence(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=draw))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(json.dumps({"prompt": sentence(2, 9) + " ", "response": sentence(1, 20)}) + "\n")
    return path


def make_recipe(path: Path, student: Path, teacher: Path | None, data: Path, out: Path, **changes) -> Path:
    """A recipe of a few steps; `changes` are dotted keys with `__` for the dot, e.g. train__steps=3."""
    instructions = "prompt" in data.read_text().splitlines()[0]
    columns = {"prompt": "prompt", "response": "response"} if instructions else {"text": "text"}
    recipe: dict = {
        "student": {"model": str(student)},
        "data": {"train": [{"path": str(data), **columns}], "workers": 0},
        "train": {"steps": 6, "seq_length": 24, "micro_batch_size": 1, "global_batch_size": 4, "learning_rate": 3e-3,
                  "warmup_steps": 2},
        "deepspeed": "ds_configs/zero3_fp32.json",
        "checkpoint": {"every": 100},
        "output_dir": str(out),
    }
    if teacher is not None:
        recipe["teacher"] = {"model": str(teacher)}
        recipe["loss"] = {"alpha": -1.0, "lam": 0.3, "order": "pr", "ce_weight": 0.5}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            recipe.setdefault(section, {})[leaf] = value
        else:
            recipe[section] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def never_resident(folder: Path, name: str = "zero3_fp32.json", **changes) -> Path:
    """A packaged DeepSpeed config under which ZeRO-3 gathers every parameter whenever it is needed: by default those of
    less than 100,000 elements, which is all that a test's models have, stay whole on every rank. (Larger ones stay from
    pass to pass where their next use is within stage3_max_reuse_distance or what has been prefetched.)"""
    config = json.loads((Path(__file__).parent.parent / "ds_configs" / name).read_text())
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **changes}
    path = folder / f"never_resident_{name}"
    path.write_text(json.dumps(config))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def launch_command(ranks: int, *arguments: str) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module", "amid_ds",
            *map(str, arguments)]


def train(ranks: int, recipe: Path, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """`train` under the deepspeed launcher on `ranks` ranks (0: by itself, as `amid-ds train`)."""
    alone = [str(BIN / "amid-ds"), "train", str(recipe), *overrides]
    command = launch_command(ranks, "train", str(recipe), *overrides) if ranks else alone
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)


# Python 3.11's fork server does not take over sys.path, and passes without a word over what it cannot import.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["warm"])


class Ranks:
    """`amid-ds ARGUMENTS` on `size` ranks: real processes, joined by gloo, that share the fork server's imports."""

    def __init__(self, size: int, *arguments: object, changes: dict[str, str] | None = None, be=None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                      **(changes or {})}
        argv = [str(argument) for argument in arguments]
        self.processes = [
            _forks.Process(target=be or be_a_rank, args=(argv, {**rendezvous, "RANK": str(r), "LOCAL_RANK": str(r)},
                                                    str(self._log(r))), daemon=True) for r in range(size)]
        for process in self.processes:
            process.start()

    def _log(self, rank: int) -> Path:
        return Path(self.folder.name) / f"rank{rank}"

    def text(self, rank: int = 0) -> str:
        """What the rank has written, both streams."""
        return self._log(rank).read_text()

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit statuses by rank; a rank that does not end is killed and reads None."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses


def be_a_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    from amid_ds.cli import main

    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    status = main(argv)
    sys.stdout.flush()
    os._exit(status)


def run(size: int, *arguments: object, timeout: float = 120) -> Ranks:
    """`Ranks`, waited for; every rank must end with 0."""
    ranks = Ranks(size, *arguments)
    statuses = ranks.wait(timeout)
    assert statuses == [0] * size, f"statuses {statuses}\n" + "\n".join(ranks.text(r) for r in range(size))
    return ranks


def documents(batch):
    """(ids [1, n], labels [n]) of every document of a batch by itself, told apart by where positions start again."""
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        places = range(len(ids)) if batch.positions is None else batch.positions[row].tolist()
        starts = [i for i, place in enumerate(places) if place == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[None, start:stop], labels[start:stop]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
