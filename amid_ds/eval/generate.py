"""A model's answers to prompts, made ahead of time: what sequence-level distillation trains on.

Batches of prompts are cut at the same places whatever the ranks, and every prompt has random numbers of its own, so the
lines do not depend on who made them or how often the work was cut short. They are added to OUT.partial in the order of
the prompts, whole batches at a time; OUT is there when all of them are. OUT.made says what they were made with, and
nothing else is added to them. The price: all ranks wait for the longest answer of as many batches as there are ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from amid_ds.config.parse import load_recipe
from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.config.recipe import Recipe, Source, Teacher
from amid_ds.config.schedule import step_seed
from amid_ds.data import end_of_text, fingerprint, load_tokenizer, prompt_ids, prompts_of
from amid_ds.data.readers import TEXT, kind_of
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine import build, ds_config, engine, gather
from amid_ds.errors import InputError, Stopped
from amid_ds.files import replace_text
from amid_ds.models import loading
from amid_ds.models.sampler import Sampler, SamplerPrompt
from amid_ds.monitor.stop_request import StopRequest
from amid_ds.run.provenance import model_hash

GENERATE_TIMEOUT_S = 1800.0
AT_ONCE = 1 << 12      # prompts that are looked at together


@dataclass(frozen=True)
class GenerateArgs:
    """What was asked for; see `amid-ds generate --help`."""

    source: str
    out: str
    prompts: str | None = None
    template: str | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 32
    end_of_text: str | None = None


@dataclass(frozen=True)
class GenerateTask:
    """A wish that can be fulfilled. `recipe`: whose teacher the model is; None: a model by itself."""

    wish: GenerateArgs
    recipe: Recipe | None
    model: Teacher
    tokenizer: Any
    sampler: Sampler
    prompts: list[str]

    @property
    def out(self) -> Path:
        return Path(self.wish.out)

    @property
    def partial(self) -> Path:
        return Path(f"{self.wish.out}.partial")

    @property
    def made(self) -> Path:
        return Path(f"{self.wish.out}.made")


def generate(wish: GenerateArgs) -> None:
    """`amid-ds generate`: every rank of every launcher comes through here. Raises InputError or Stopped."""
    with init_distributed(GENERATE_TIMEOUT_S) as world:
        task = world.run_checked(lambda: check_generate(wish))
        done = world.run_on_main(lambda: begin(task))
        if done is None:
            _tell(world, f"{task.out} is complete: nothing to do")
            return
        with (StopRequest(task.out.parent, None, world.is_main) as request,
              answering(task, world) as (model, sampler, together),
              tqdm(total=len(task.prompts), initial=done, desc="generate", disable=not world.is_main or None) as bar):
            size = wish.batch_size
            for first in range(done, len(task.prompts), size * world.size):
                mine = range(first + world.rank * size, min(first + (world.rank + 1) * size, len(task.prompts)))
                answers = world.run_checked(partial(sampler.complete, model, asked(task, mine), together or bool,
                                                 world.device))
                everyone = world.gather((answers, request.reason()))
                lines = [answer for part, _ in everyone for answer in part]
                world.run_on_main(partial(add, task, first, lines))
                bar.update(len(lines))
                reasons = sorted({why for _, why in everyone if why is not None})
                if reasons and first + len(lines) < len(task.prompts):
                    request.honoured()
                    _tell(world, f"stopped in order ({', '.join(reasons)}); the same command goes on from there")
                    raise Stopped
        _tell(world, world.run_on_main(lambda: finish(task)))


def _tell(world: World, message: str) -> None:
    if world.is_main:
        print(message, flush=True)


def check_generate(wish: GenerateArgs) -> GenerateTask:
    """All that can be judged before a weight is read. Raises InputError."""
    for name, value, fine, expected in (("--max-new-tokens", wish.max_new_tokens, wish.max_new_tokens > 0, "1 or more"),
                                        ("--batch-size", wish.batch_size, wish.batch_size > 0, "1 or more"),
                                        ("--temperature", wish.temperature, 0 <= wish.temperature < float("inf"),
                                         "0 or more"), ("--top-p", wish.top_p, 0 < wish.top_p <= 1, "in (0, 1]")):
        if not fine:
            raise InputError(f"{name} {value}", expected, f"give {name} such a number")
    recipe = load_recipe(wish.source) if wish.source.endswith((".yaml", ".yml")) else None
    if recipe is not None and recipe.teacher is None:
        raise InputError(f"the recipe {wish.source} has no `teacher`", "a model to answer the prompts",
                         "name a teacher in it, or give a model instead of the recipe")
    model = (recipe.teacher if recipe is not None else None) or Teacher(model=wish.source)
    limit = getattr(loading.model_config(model.model, **model.hub_kwargs), "max_position_embeddings", None)
    tokenizer = load_tokenizer(model.model, **model.hub_kwargs)
    end = end_of_text(tokenizer, wish.end_of_text)
    prompts = [prompt for source in sources(wish, recipe)
               for prompt in prompts_of(source, recipe.data.on_bad_row if recipe is not None else "error")]
    check_prompts_fit(tokenizer, prompts, wish.max_new_tokens, limit)
    if not Path(wish.out).parent.is_dir():
        raise InputError(f"the folder of --out {wish.out} is not there", "a folder to write into", "make it")
    return GenerateTask(wish, recipe, model, tokenizer, Sampler(wish.temperature, wish.top_p, end, len(tokenizer)), prompts)


def sources(wish: GenerateArgs, recipe: Recipe | None) -> list[Source]:
    """Where the prompts come from: the file, or the recipe's rows to train on."""
    if wish.template is not None and wish.template not in TEMPLATES:
        raise InputError(f"--template {wish.template}", f"one of {', '.join(TEMPLATES)}", "check the spelling")
    if wish.prompts is not None and kind_of(wish.prompts) in TEXT:
        raise InputError(f"--prompts {wish.prompts} is plain text", "rows with a `prompt`, such as JSON lines",
                         "make each prompt a line {\"prompt\": …}")
    if wish.prompts is not None:
        column: dict[str, str] = {"text": "prompt"} if wish.template is None else {"template": wish.template}
        return [Source(path=wish.prompts, **column)]   # type: ignore[arg-type]
    if recipe is None:
        raise InputError("no --prompts, and a model has none", "a file with a `prompt` in each row", "name one")
    if other := [source.path for source in recipe.data.train if source.is_text or source.messages is not None]:
        raise InputError(f"no --prompts, and the rows of {other[0]} are plain text or conversations",
                         "rows with a prompt and a response", "name a file with --prompts")
    return recipe.data.train


def check_prompts_fit(tokenizer: Any, prompts: Sequence[str], new_tokens: int, limit: int | None) -> None:
    """Raise InputError where there is no prompt, or one after which the model has not so many positions."""
    if not prompts:
        raise InputError("no prompts", "at least one", "check the file")
    for start in range(0, len(prompts) if limit is not None else 0, AT_ONCE):
        for number, ids in enumerate(prompt_ids(tokenizer, prompts[start:start + AT_ONCE]), start + 1):
            if limit is not None and len(ids) + new_tokens > limit:
                raise InputError(f"prompt {number} ({prompts[number - 1][:40]!r}…) has {len(ids)} tokens: there is no "
                                 f"room to generate {new_tokens} in the model's {limit} positions",
                                 f"prompts of at most {limit - new_tokens} tokens",
                                 "shorten it, or lower --max-new-tokens")


@contextlib.contextmanager
def answering(task: GenerateTask, world: World) -> Iterator[tuple[nn.Module, Sampler, Callable[[bool], bool] | None]]:
    """The model, the sampler, and how ranks that share its weights ask each other whether to go on; None: each by
    itself. At ZeRO stage 3 a recipe's teacher is sharded, unless its placement is `replicated`, and gathered once where
    it fits; any other model is whole on every rank."""
    model, sampler = task.model, task.sampler
    config = {} if task.recipe is None else ds_config.read_deepspeed_config(task.recipe, data_parallel=1)
    if model.placement == "replicated" or ds_config.zero_stage(config) < 3:
        yield world.run_checked(lambda: loading.load_causal_lm(model.model, model.dtype, **model.hub_kwargs).to(world.device)
                             ), sampler, None
        return
    ds = world.run_checked(lambda: build.build_teacher(model, config))
    if engine.fits_whole(ds, ds.module, world):
        with gather.gathered(ds, ds.module):
            yield ds.module, sampler, None
        return

    def together(mine: bool) -> bool:
        engine.start_step(ds)      # a token's gathers are ZeRO-3's trace
        return world.sum([mine])[0] > 0

    yield ds.module, replace(sampler, head=gather.gathered_head), together


def asked(task: GenerateTask, numbers: range) -> list[SamplerPrompt]:
    """The prompts of these numbers, each with a seed of its own."""
    every = prompt_ids(task.tokenizer, [task.prompts[number] for number in numbers])
    return [SamplerPrompt(ids, task.wish.max_new_tokens, step_seed(task.wish.seed, number, 0))
            for ids, number in zip(every, numbers, strict=True)]


def begin(task: GenerateTask) -> int | None:
    """On rank 0: how many answers are there from before, whole batches alone; None: all, and OUT is there."""
    identity = json.dumps(made_with(task), indent=1)
    there = [path for path in (task.out, task.partial) if path.exists()]
    if there and (not task.made.exists() or task.made.read_text(encoding="utf-8") != identity):
        before = json.loads(task.made.read_text(encoding="utf-8")) if task.made.exists() else {}
        changed = [name for name, value in made_with(task).items() if before.get(name) != value]
        raise InputError(f"{there[0]} was made with something else: {', '.join(changed)}",
                         "the model, prompts and settings of before, or a new file",
                         f"name another --out, or remove it and {task.made}")
    replace_text(task.made, identity)
    if task.out.exists():
        return None
    kept: list[bytes] = []
    if task.partial.exists():
        kept = [line for line in task.partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    if len(kept) < len(task.prompts):      # batches begin at the same places as in one go
        kept = kept[:len(kept) // task.wish.batch_size * task.wish.batch_size]
    with open(task.partial, "ab") as file:
        file.truncate(sum(map(len, kept)))
    return len(kept)


def made_with(task: GenerateTask) -> dict[str, Any]:
    """What decides what the lines say."""
    wish = task.wish
    digest = hashlib.sha256("\0".join(task.prompts).encode()).hexdigest()
    return {"model": task.model.model, "revision": task.model.revision, "model.sha256": model_hash(task.model.model),
            "tokenizer.sha256": fingerprint(task.tokenizer), "prompts": len(task.prompts), "prompts.sha256": digest,
            "max_new_tokens": wish.max_new_tokens, "temperature": wish.temperature, "top_p": wish.top_p,
            "seed": wish.seed, "batch_size": wish.batch_size, "end_of_text": task.sampler.end}


def add(task: GenerateTask, first: int, answers: Sequence[list[int]]) -> None:
    """On rank 0: the lines of the answers to the prompts from `first` on, at the end of OUT.partial."""
    lines = []
    for prompt, ids in zip(task.prompts[first:first + len(answers)], answers, strict=True):
        ended = ids[-1] == task.sampler.end
        response = task.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        lines.append(json.dumps({"prompt": prompt, "response": response, "ended": ended}, ensure_ascii=False) + "\n")
    with open(task.partial, "ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def finish(task: GenerateTask) -> str:
    """On rank 0: OUT is there. Returns what to tell."""
    os.replace(task.partial, task.out)
    with open(task.out, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    empty, cut = sum(not row["response"] for row in rows), sum(not row["ended"] for row in rows)
    return (f"{task.out}: {len(rows)} answers, {cut} of them cut after {task.wish.max_new_tokens} tokens"
            + (f"; {empty} are empty: data.on_bad_row=skip leaves them out of training" if empty else ""))
