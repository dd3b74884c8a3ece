"""A model's answers to prompts, generated ahead of time: data for sequence-level distillation.

Prompts are cut into the same batches on any number of ranks, and every prompt has its own random
numbers, so the lines depend neither on the ranks nor on interruptions. They are appended to
OUT.partial in the order of the prompts, whole batches at a time, and OUT appears when all of them
are there. OUT.made names the model, prompts and settings; a run with others is refused. The price:
all ranks wait for the longest answer of as many batches as there are ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from tqdm import tqdm

from amid_ds.config.parse import load_recipe, source_of
from amid_ds.config.recipe import Recipe, Source, Teacher
from amid_ds.config.schedule import step_seed
from amid_ds.data import (
    encode_prompts,
    load_tokenizer,
    read_prompts,
    tokenizer_fingerprint,
    vocabulary_size,
)
from amid_ds.data.readers import TEXT_FORMATS, file_format
from amid_ds.distributed.nodes import ranks_of_copy
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.build import build_teacher_engine
from amid_ds.errors import InputError
from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import Fence
from amid_ds.files.ownership import require_own_file
from amid_ds.models import loading
from amid_ds.models.adapter_folders import ModelSource, model_source
from amid_ds.models.ends import end_ids, generation_config
from amid_ds.models.fit import require_rows
from amid_ds.models.heads import check_head, ids_to_check
from amid_ds.models.sampler import Sampler, SamplerPrompt, require_sampling_ranges
from amid_ds.monitor.stop_request import StopRequest
from amid_ds.run.exclusive import exclusive
from amid_ds.run.provenance import model_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GENERATE_TIMEOUT_S = 1800.0
# Prompts that are tokenised together while their lengths are checked.
PROMPTS_PER_CHECK = 1 << 12
# Agrees with all ranks on going on; see Sampler.complete.
AnyRank = Callable[[bool], bool]


@dataclass(frozen=True)
class GenerateArgs:
    """The arguments of `amid-ds generate`; see its --help."""

    source: str
    out: str
    prompts: str | None = None
    prompt: str | None = None
    template: str | None = None
    split: str | None = None
    on_bad_row: str | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 32
    end_of_text: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class GenerateTask:
    """Validated arguments, and what they resolve to.

    recipe: the one whose teacher `model` is; None: `model` was named by itself. source: where its
    parts are, a folder of adapters is two.
    """

    args: GenerateArgs
    recipe: Recipe | None
    model: Teacher
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    prompts: list[str]

    @property
    def out(self) -> Path:
        """The file of all answers."""
        return Path(self.args.out)

    @property
    def partial_file(self) -> Path:
        """The file of the answers so far."""
        return Path(f"{self.args.out}.partial")

    @property
    def identity_file(self) -> Path:
        """The file that names model, prompts and settings."""
        return Path(f"{self.args.out}.made")

    @property
    def lease(self) -> Path:
        """There while a process generates."""
        return Path(f"{self.args.out}.lease.json")


def generate(args: GenerateArgs) -> None:
    """`amid-ds generate`, on every rank of any launcher. Raises InputError, Stopped."""
    with init_distributed(GENERATE_TIMEOUT_S) as world:
        task = world.run_checked(lambda: check_generate(args))
        with exclusive(task.lease, f"the output {task.out}", world) as fence:
            _generate(task, world, fence)


def _generate(task: GenerateTask, world: World, fence: Fence) -> None:
    """Generate what is missing; the lease on the output is held."""
    done = world.run_on_main(lambda: prepare_output(task))
    if done is None:
        logger.info(f"{task.out} is complete: nothing to do")
        return
    total = len(task.prompts)
    with (StopRequest(None, None, world.is_main) as request,
          open_model(task, world) as (model, sampler, any_rank),
          tqdm(total=total, initial=done, desc="generate",
               disable=not world.is_main or None) as bar):
        ids = ids_to_check(model, sampler.vocab_size).to(world.device)
        world.run_checked(lambda: check_head(model, f"the model {task.model.model}", ids,
                                             sampler.head))
        size = task.args.batch_size
        for first in range(done, total, size * world.size):
            start = first + world.rank * size
            prompts = sampler_prompts(task, range(start, min(start + size, total)))
            answers = world.run_checked(
                partial(sampler.complete, model, prompts, any_rank, world.device))
            in_order = [answer for batch in world.collect(answers) or [] for answer in batch]
            world.run_on_main(partial(append_answers, task, first, in_order, fence))
            count = min(size * world.size, total - first)
            bar.update(count)
            if first + count < total:
                request.obey(world)
    logger.info(world.run_on_main(lambda: publish_answers(task, fence)))


def check_generate(args: GenerateArgs) -> GenerateTask:
    """The task of the arguments, checked without reading a weight. Raises InputError."""
    require_sampling_ranges(args.max_new_tokens, args.temperature, args.top_p)
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}", "1 or more", "give one such number")
    recipe = load_recipe(args.source) if args.source.endswith((".yaml", ".yml")) else None
    if recipe is not None and args.trust_remote_code:
        raise InputError("--trust-remote-code beside a recipe", "the recipe's own keys",
                         "set teacher.trust_remote_code: true in it")
    if recipe is not None and recipe.live_teacher is None:
        raise InputError(f"the recipe {args.source} has no `teacher` that is a model",
                         "a model to answer the prompts",
                         "name a teacher in it, or give a model instead of the recipe")
    model = (recipe.live_teacher if recipe is not None else None) or Teacher(
        model=args.source, trust_remote_code=args.trust_remote_code)
    # A branch of the hub may move before the answers are complete.
    commit = loading.resolved_commit(model.model, model.revision)
    model = model.model_copy(update={"revision": commit or model.revision})
    source = model_source(model.model, **model.hub_kwargs)
    if recipe is not None and source.adapters is not None:
        loading.refuse_adapters(source.adapters)
    config = loading.model_config(source.model, **source.hub_kwargs)
    tokenizer = load_tokenizer(model.model, **model.hub_kwargs)
    require_rows(loading.meta_model(source.model, **source.hub_kwargs), f"the model {model.model}",
                 vocabulary_size(tokenizer))
    ends = end_ids(generation_config(source.model, **source.hub_kwargs), tokenizer,
                   args.end_of_text)
    on_bad_row = args.on_bad_row or (recipe.data.on_bad_row if recipe is not None else "error")
    prompts = [prompt for rows in prompt_sources(args, recipe)
               for prompt in read_prompts(rows, on_bad_row)]
    check_prompts_fit(tokenizer, prompts, args.max_new_tokens,
                      getattr(config, "max_position_embeddings", None))
    sampler = Sampler(args.temperature, args.top_p, ends, vocabulary_size(tokenizer))
    task = GenerateTask(args, recipe, model, source, tokenizer, sampler, prompts)
    # `prepare_output` refuses answers without the file that names their origin.
    require_own_file(task.out, lambda text: True, "--out")
    if not task.out.parent.is_dir():
        raise InputError(f"the folder of --out {args.out} is not there", "a folder to write into",
                         "make it")
    require_own_file(task.identity_file, lambda text: "prompts.sha256" in text, "--out: the file")
    return task


def prompt_sources(args: GenerateArgs, recipe: Recipe | None) -> list[Source]:
    """The sources of the prompts: the file of --prompts, or the recipe's training rows.

    Raises InputError if they have no prompts.
    """
    options = {name: value for name in ("prompt", "template", "split")
               if (value := getattr(args, name)) is not None}
    if len(options.keys() - {"split"}) > 1 or (options and args.prompts is None):
        raise InputError(" ".join(f"--{name} {value}" for name, value in options.items())
                         + ("" if args.prompts else " without --prompts"),
                         "--prompt COL or --template NAME, for the file of --prompts",
                         "leave one out, or name the file")
    if args.prompts is not None and file_format(args.prompts) in TEXT_FORMATS:
        raise InputError(f"--prompts {args.prompts} is plain text",
                         "rows with a `prompt`, such as JSON lines",
                         "make each prompt a line {\"prompt\": …}")
    if args.prompts is not None:
        if args.template is None:
            # Read like a text column: a prompt without a response.
            options["text"] = options.pop("prompt", "prompt")
        return [source_of({"path": args.prompts, **options})]
    if recipe is None:
        raise InputError("no --prompts, and a model has none", "a file with a `prompt` in each row",
                         "name one")
    if other := [source.path for source in recipe.data.train
                 if source.is_text or source.messages is not None]:
        raise InputError(f"no --prompts, and the rows of {other[0]} are plain text or "
                         "conversations",
                         "rows with a prompt and a response", "name a file with --prompts")
    return recipe.data.train


def check_prompts_fit(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int,
                      limit: int | None) -> None:
    """Raise InputError if there is no prompt, or one that leaves no room for `new_tokens`.

    limit: the model's positions; None: unlimited.
    """
    if not prompts:
        raise InputError("no prompts", "at least one", "check the file")
    if limit is None:
        return
    for start in range(0, len(prompts), PROMPTS_PER_CHECK):
        encoded = encode_prompts(tokenizer, prompts[start:start + PROMPTS_PER_CHECK])
        for number, ids in enumerate(encoded, start + 1):
            if len(ids) + new_tokens > limit:
                opening = prompts[number - 1][:40]
                raise InputError(f"prompt {number} ({opening!r}…) has {len(ids)} tokens: there is "
                                 f"no room to generate {new_tokens} in the model's {limit} "
                                 "positions",
                                 f"prompts of at most {limit - new_tokens} tokens",
                                 "shorten it, or lower --max-new-tokens")


@contextlib.contextmanager
def open_model(task: GenerateTask, world: World) -> Iterator[tuple[nn.Module, Sampler, AnyRank]]:
    """(model, sampler, agreement on going on) for the task. Collective.

    At ZeRO stage 3 a recipe's teacher is sharded, unless its placement is `replicated`, and
    gathered once if it fits; any other model is whole on every rank. Its placement `node` is as in
    training, `auto` is `zero3`: nothing is planned here. Ranks with whole models generate
    independently; ranks that share weights agree after every token (one collective).
    """
    model, sampler = task.model, task.sampler
    config = {} if task.recipe is None else ds_config.read_deepspeed_config(task.recipe,
                                                                            data_parallel=1)
    if model.placement == "replicated" or ds_config.zero_stage(config) < 3:
        whole = world.run_checked(lambda: task.source.load(model.dtype).to(world.device))
        yield whole, sampler, bool
        return
    if model.placement == "node":
        over = world.run_on_main(lambda: ranks_of_copy(model.shard_over, 1, world))
        world = world.split(1, over) if over < world.size else world
    engine = world.run_checked(lambda: build_teacher_engine(model, config, world))
    if engine.fits_gathered(engine.module):
        with engine.gathered(engine.module):
            yield engine.module, sampler, bool
        return

    def any_rank(own: bool) -> bool:
        engine.reset_prefetch()
        return world.sum([own])[0] > 0

    yield engine.module, replace(sampler, head=engine.gathered_head), any_rank


def sampler_prompts(task: GenerateTask, numbers: range) -> list[SamplerPrompt]:
    """The prompts of these numbers (from 0), each with its own seed."""
    encoded = encode_prompts(task.tokenizer, [task.prompts[number] for number in numbers])
    return [SamplerPrompt(ids, task.args.max_new_tokens, step_seed(task.args.seed, number, 0))
            for ids, number in zip(encoded, numbers, strict=True)]


def prepare_output(task: GenerateTask) -> int | None:
    """On rank 0: keep the answers of an earlier run in whole batches, and return their number.

    None if all are there, in OUT. Raises InputError if they were generated by another task.
    """
    identity = task_identity(task)
    text = json.dumps(identity, indent=1)
    existing = [path for path in (task.out, task.partial_file) if path.exists()]
    before = (task.identity_file.read_text(encoding="utf-8") if task.identity_file.exists()
              else None)
    if existing and before != text:
        known = {} if before is None else json.loads(before)
        changed = [name for name, value in identity.items() if known.get(name) != value]
        raise InputError(f"{existing[0]} was made with something else: {', '.join(changed)}",
                         "the model, prompts and settings of before, or a new file",
                         f"name another --out, or remove it and {task.identity_file}")
    replace_text(task.identity_file, text)
    if task.out.exists():
        return None
    kept: list[bytes] = []
    if task.partial_file.exists():
        lines = task.partial_file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n")]
    if len(kept) < len(task.prompts):
        # Batches start at the same prompts as in an uninterrupted run.
        kept = kept[:len(kept) // task.args.batch_size * task.args.batch_size]
    with open(task.partial_file, "ab") as file:
        file.truncate(sum(map(len, kept)))
    return len(kept)


def task_identity(task: GenerateTask) -> dict[str, str | float | list[int] | None]:
    """Everything that the answers depend on."""
    args, model = task.args, task.model
    digest = hashlib.sha256("\0".join(task.prompts).encode()).hexdigest()
    base = {} if task.source.adapters is None else {
        "base": task.source.model, "base.sha256": model_hash(task.source.model)}
    return {"model": model.model, "revision": model.revision,
            "model.sha256": model_hash(model.model), **base,
            "tokenizer.sha256": tokenizer_fingerprint(task.tokenizer),
            "prompts": len(task.prompts), "prompts.sha256": digest,
            "max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
            "top_p": args.top_p, "seed": args.seed, "batch_size": args.batch_size,
            "end_of_text": list(task.sampler.ends)}


def append_answers(task: GenerateTask, first: int, answers: Sequence[list[int]],
                   fence: Fence) -> None:
    """On rank 0: append to OUT.partial the answers to the prompts from number `first` on."""
    lines = []
    prompts = task.prompts[first:first + len(answers)]
    for prompt, ids in zip(prompts, answers, strict=True):
        ended = ids[-1] in task.sampler.ends
        response = task.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        row = {"prompt": prompt, "response": response, "ended": ended}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    fence.check()
    with open(task.partial_file, "ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def publish_answers(task: GenerateTask, fence: Fence) -> str:
    """On rank 0: rename OUT.partial to OUT. Returns a summary to log."""
    fence.check()
    os.replace(task.partial_file, task.out)
    with open(task.out, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    empty = sum(not row["response"] for row in rows)
    cut = sum(not row["ended"] for row in rows)
    summary = (f"{task.out}: {len(rows)} answers, {cut} of them cut after "
               f"{task.args.max_new_tokens} tokens")
    if empty:
        summary += f"; {empty} are empty: data.on_bad_row=skip leaves them out of training"
    return summary
