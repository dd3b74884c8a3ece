"""`amid-ds chat`: a conversation in the terminal with a model, or with two of them side by side.

Each model has a history of its own: it continues its own answers. A tokenizer with a chat template
makes a conversation of what is written; without one the model continues the text, what it has
added to earlier lines included. Both models answer at once, from the same random numbers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from amid_ds.config.schedule import step_seed
from amid_ds.data import encode_prompts, load_tokenizer, vocabulary_size
from amid_ds.data.chat import require_chat_template
from amid_ds.distributed.devices import choose_device
from amid_ds.distributed.rank_logging import leave_stdout_to_results
from amid_ds.errors import InputError, TrainingError, printable, report_error
from amid_ds.models.adapter_folders import model_source
from amid_ds.models.ends import end_ids, generation_config
from amid_ds.models.fit import require_rows
from amid_ds.models.loading import meta_model
from amid_ds.models.sampler import NO_TOKEN, Sampler, require_sampling_ranges
from amid_ds.models.shape import text_config
from amid_ds.run.console import PlainConsole
from amid_ds.run.folder import RunFolder
from amid_ds.run.warm_start import find_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HELP = """/reset  forget the conversation
/quit   end, as Ctrl-D does
Ctrl-C  stop the answer"""
# What looks like one; a path in a message does not.
COMMAND = re.compile(r"/\w*")
# Of a terminal, so that two columns can be read.
SIDE_BY_SIDE_WIDTH = 80
# Seconds between two looks at the answers.
REFRESH_S = 0.1
# Lines of a terminal beside the answers: names, the line below, the next prompt.
OTHER_LINES = 4
# Of an answer, as it is; with the joiners of emoji and of Persian and Indic words.
SHOWN = "\n\t\u200c\u200d"
# What decoders make of bytes that are no whole character.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class ChatArgs:
    """The arguments of `amid-ds chat`; see its --help."""

    model: str
    beside: str | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    trust_remote_code: bool = False


class Answer:
    """What a model has said so far in one answer; transformers' `generate` streams into it.

    prompt: the ids before it. continues: it goes on with their text, and its own begins with what
    they leave open, such as a space; else it begins a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int],
                 prompt: Sequence[int], continues: bool) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.prompt = list(prompt)
        self.context = self.prompt if continues else []
        self.ids: list[int] = []
        self.is_complete = False
        self._before = len(self._decode(self.context))
        self._has_prompt = False
        self._whole = ""

    def put(self, ids: Tensor) -> None:
        """Take the next ids; the first ones are the prompt's."""
        if self._has_prompt:
            self.ids += ids.flatten().tolist()
        self._has_prompt = True

    def end(self) -> None:
        """Nothing follows."""
        self.is_complete = True

    @property
    def text(self) -> str:
        """The answer without its end; without the beginning of a character, until complete."""
        ids = list(self.ids)
        while ids and ids[-1] in self.ends:
            ids.pop()
        text = self._decode([*self.context, *ids])[self._before:]
        if self.is_complete:
            return text
        # Some decoders spoil whole characters before one whose bytes are not all there.
        self._whole = max(self._whole, text.rstrip(INCOMPLETE), key=len)
        return self._whole

    def _decode(self, ids: list[int]) -> str:
        # Cleaned up, the text would change as it grows.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True,
                                         clean_up_tokenization_spaces=False))


@dataclass
class Speaker:
    """A model, and its side of the conversation.

    turns: (message, answer), oldest first. limit: tokens that it takes; None: any number.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    limit: int | None
    turns: list[tuple[str, str]] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """True if its tokenizer makes a conversation of messages."""
        return self.tokenizer.chat_template is not None

    def prompt_ids(self, message: str, new_tokens: int) -> list[int]:
        """The ids of the conversation up to the answer to `message`.

        The oldest turns are forgotten where `new_tokens` would find no room. Raises InputError if
        the message alone leaves no room for one.
        """
        forgotten = 0
        while True:
            ids = self._encode(message)
            room = new_tokens if self.limit is None else self.limit - len(ids)
            if room >= new_tokens or not self.turns:
                break
            del self.turns[0]
            forgotten += 1
        if room < 1:
            raise InputError(f"the message has {len(ids)} tokens, and {self.name} takes "
                             f"{self.limit} with its answer", "a shorter message", "cut it")
        if forgotten:
            logger.info("(%s has forgotten the oldest %d of the conversation's turns: it takes %d "
                        "tokens)", self.name, forgotten, self.limit)
        return ids

    def _encode(self, message: str) -> list[int]:
        if not self.has_template:
            lines = [*(said + answer for said, answer in self.turns), message]
            return encode_prompts(self.tokenizer, ["\n".join(lines)])[0]
        messages = [{"role": role, "content": text} for turn in self.turns
                    for role, text in zip(("user", "assistant"), turn, strict=True)]
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": message}], add_generation_prompt=True,
                return_dict=True)["input_ids"]
        except Exception as error:
            # A template is its author's program, and raises anything.
            raise InputError(f"the chat template of {self.name} cannot be used: {error}",
                             "one that takes a conversation of user and assistant",
                             "correct chat_template in its tokenizer_config.json") from None
        return ids

    def begin(self, message: str, new_tokens: int) -> Answer:
        """The answer to `message`, nothing of it written yet. Raises InputError."""
        return Answer(self.tokenizer, self.sampler.ends, self.prompt_ids(message, new_tokens),
                      continues=not self.has_template)


def chat(args: ChatArgs) -> None:
    """Answer each line of stdin until its end or /quit. Raises InputError, TrainingError."""
    require_sampling_ranges(args.max_new_tokens, args.temperature, args.top_p)
    names = [args.model, *([] if args.beside is None else [args.beside])]
    # stdout is the answers' alone.
    leave_stdout_to_results(True)
    device = choose_device(0)
    speakers = [open_speaker(name, args, device) for name in names]
    for speaker in speakers:
        if not speaker.has_template:
            logger.info("(%s has no chat template: it continues your text)", speaker.name)
    terminal = sys.stdin.isatty()
    with ThreadPoolExecutor(len(speakers), initializer=partial(_divide_cores, device,
                                                               len(speakers))) as pool:
        for number, line in enumerate(_lines(terminal)):
            message = line.strip()
            if message == "/quit":
                break
            if message == "/reset":
                for speaker in speakers:
                    speaker.turns.clear()
            elif COMMAND.fullmatch(message):
                print(HELP)
            elif message:
                try:
                    _take_turn(speakers, line, args, number, pool)
                except InputError as error:
                    # Whoever sits there writes another message.
                    if not terminal:
                        raise
                    report_error(error)


def open_speaker(name: str, args: ChatArgs, device: torch.device) -> Speaker:
    """The model `name`, a run's folder for the model that it has left, on `device`.

    Raises InputError.
    """
    source = model_source(_model_of(name), trust_remote_code=args.trust_remote_code)
    tokenizer = load_tokenizer(_model_of(name), **source.hub_kwargs)
    if tokenizer.chat_template is not None:
        require_chat_template(tokenizer)
    vocab_size = vocabulary_size(tokenizer)
    require_rows(meta_model(source.model, **source.hub_kwargs), f"the model {name}", vocab_size)
    ends = end_ids(generation_config(source.model, **source.hub_kwargs), tokenizer)
    logger.info("reading %s", name)
    model = source.load("auto").to(device).eval()
    return Speaker(name, model, tokenizer,
                   Sampler(args.temperature, args.top_p, ends, vocab_size),
                   getattr(text_config(model), "max_position_embeddings", None))


def _model_of(name: str) -> str:
    run = find_run(name)
    if run is None:
        return name
    if not RunFolder(run).model.is_dir():
        raise InputError(f"the run {run} has left no model yet", "a model, or a finished run",
                         f"export its newest checkpoint: amid-ds export {run} OUT")
    return str(RunFolder(run).model)


def _divide_cores(device: torch.device, models: int) -> None:
    """Give this thread, one of `models` that compute at once, its share of the cores."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // models))


def _lines(terminal: bool) -> Iterator[str]:
    """What is written, line by line, until Ctrl-D or the end of stdin."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        # It makes input() a line that can be edited, with the earlier ones at the arrows.
        import readline  # noqa: F401
    print("/help shows the commands, Ctrl-D ends")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends")


def _take_turn(speakers: Sequence[Speaker], message: str, args: ChatArgs, number: int,
               pool: ThreadPoolExecutor) -> None:
    """Have all models answer at once, show it, and remember it; Ctrl-C ends the answers."""
    answers = [speaker.begin(message, args.max_new_tokens) for speaker in speakers]
    stop = threading.Event()
    seed = step_seed(args.seed, number, 0)
    work = [pool.submit(_complete, speaker, answer, args.max_new_tokens, seed, stop)
            for speaker, answer in zip(speakers, answers, strict=True)]
    console = PlainConsole(highlight=False)
    animates = console.is_terminal and not console.is_dumb_terminal
    show = (_show_side_by_side if len(speakers) > 1 and animates
            and console.width >= SIDE_BY_SIDE_WIDTH else _show_in_order)
    try:
        show(console, [speaker.name for speaker in speakers], answers, work)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stop.set()
        wait(work)
        print("\n(stopped)")
    finally:
        # Also where stdout is closed: the pool waits for its threads.
        stop.set()
    for speaker, answer, future in zip(speakers, answers, work, strict=True):
        future.result()
        speaker.turns.append((message, answer.text))


@torch.no_grad()
def _complete(speaker: Speaker, answer: Answer, new_tokens: int, seed: int,
              stop: threading.Event) -> None:
    """Let the model write the answer, until its end, `new_tokens`, no room, or `stop`."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    prompt = answer.prompt
    room = new_tokens if speaker.limit is None else min(new_tokens, speaker.limit - len(prompt))
    uniform = torch.rand(room, generator=torch.Generator().manual_seed(seed))

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        drawn = uniform[ids.shape[1] - len(prompt)].to(scores.device)
        chosen = speaker.sampler.choose(scores[:, :speaker.sampler.vocab_size], drawn[None])
        if int(chosen) == NO_TOKEN:
            raise TrainingError(f"the logits of {speaker.name} hold NaN or infinity: no token can "
                                "be chosen\n  its weights are damaged, or too large for its dtype")
        return torch.full_like(scores, -math.inf).index_fill(1, chosen, 0)

    def stopped(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    ids = torch.tensor([prompt], device=speaker.model.device)
    ends = speaker.sampler.ends
    speaker.model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=answer,
        generation_config=GenerationConfig(max_new_tokens=room, do_sample=False, num_beams=1,
                                           eos_token_id=list(ends), pad_token_id=ends[0]),
        logits_processor=LogitsProcessorList([choose]),
        stopping_criteria=StoppingCriteriaList([stopped]))


def _show_in_order(console: PlainConsole, names: Sequence[str], answers: Sequence[Answer],
                   work: Sequence[Future[None]]) -> None:
    """Print one answer below the other as they grow, with a model's name where there are two."""
    for name, answer, future in zip(names, answers, work, strict=True):
        if len(names) > 1:
            print(f"[{printable(name)}]")
        shown = 0
        while True:
            is_last = future.done()
            text = answer.text
            print(printable(text[shown:], SHOWN), end="", flush=True)
            shown = len(text)
            if is_last:
                break
            wait([future], REFRESH_S)
        print()


def _show_side_by_side(console: PlainConsole, names: Sequence[str], answers: Sequence[Answer],
                       work: Sequence[Future[None]]) -> None:
    """Show the answers in columns as they grow; of long ones their ends, and at last all."""
    with Live(console=console, auto_refresh=False) as live:
        while wait(work, REFRESH_S).not_done:
            live.update(_columns(console, names, answers, console.height - OTHER_LINES),
                        refresh=True)
        live.update(_columns(console, names, answers), refresh=True)


def _columns(console: PlainConsole, names: Sequence[str], answers: Sequence[Answer],
             height: int | None = None) -> Table:
    """The answers beside each other, each under its model's name; their last `height` lines."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    width = (console.width - 3 * len(names)) // len(names)
    columns = [Text(printable(answer.text, SHOWN)).wrap(console, width) for answer in answers]
    longest = max(map(len, columns))
    first = 0 if height is None else max(0, longest - height)
    for name in names:
        table.add_column(Text(printable(name)), width=width, no_wrap=True)
    table.add_row(*(Text("\n").join(lines[first:]) for lines in columns))
    return table
