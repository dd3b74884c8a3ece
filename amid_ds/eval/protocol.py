"""What `eval` is asked, and the published protocols by name.

Two scores of generations compare only if length, prompts, seeds and what is banned are the same. A
protocol is a set of these values; a named one is that of published tables. Options replace single
values, and the scores say which were used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeVar

from amid_ds.config.recipe import Dtype, Source
from amid_ds.errors import InputError, suggest
from amid_ds.eval.rows import RowOptions
from amid_ds.eval.text_metrics import PUBLISHED_SEEDS, Sampling, require_rouge

_T = TypeVar("_T")


@dataclass(frozen=True)
class EvalProtocol:
    """How a file's rows are scored.

    seq_length: tokens of a row, and of a prompt and its answer together. seeds: one sample per
    prompt of each; (): no samples; None: the published five, if the rows have prompts. new_tokens:
    of an answer at most; None: half of those that both may have. prompt_tokens: of a prompt at
    most; None: what the answer leaves. keep: the end of a longer one that stays. no_repeat_ngram:
    no run of as many tokens comes twice in prompt and answer; 0: any may. prompts: that are
    answered, from the file's first; None: all. dtype: the models are computed in; auto: that of
    each one's checkpoint.
    """

    name: str | None = None
    seq_length: int = 512
    seeds: tuple[int, ...] | None = None
    new_tokens: int | None = None
    prompt_tokens: int | None = None
    keep: Literal["first", "last"] = "last"
    no_repeat_ngram: int = 0
    prompts: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    dtype: Dtype = "auto"

    def on(self, source: Source, room: int, path: str) -> EvalProtocol:
        """The protocol with every value that depends on the rows, and on the `room` of tokens that
        the models have for prompt and answer. path: the rows', for messages.

        Raises InputError if it asks for what the rows or models cannot give.
        """
        has_references = source.prompt is not None or source.template is not None
        new_tokens = room // 2 if self.new_tokens is None else self.new_tokens
        seeds = self.seeds
        if seeds is None:
            seeds = PUBLISHED_SEEDS if has_references else ()
        if seeds and not has_references:
            raise InputError(f"--seeds {len(seeds)} with {path}, whose rows have no prompt and no "
                             "reference",
                             "prompt and response, or instruction, input and output: ROUGE-L "
                             "compares with these",
                             "give such a file, or leave --seeds out")
        if not 0 < new_tokens < room:
            named = f" (by the protocol {self.name})" if self.name else ""
            raise InputError(f"--new-tokens {new_tokens}{named}, and models and --seq-length leave "
                             f"{room} tokens",
                             f"from 1 to {room - 1} new tokens, room for a prompt",
                             "change --new-tokens or --seq-length")
        if self.no_repeat_ngram < 0 or self.no_repeat_ngram == 1:
            # Of 1 it would ban the padding of a batch, which ends an answer.
            raise InputError(f"--no-repeat-ngram {self.no_repeat_ngram}",
                             "2 tokens or more, or 0: any may repeat", "e.g. --no-repeat-ngram 6")
        left = room - new_tokens
        return replace(self, seeds=seeds, new_tokens=new_tokens,
                       prompt_tokens=min(left, self.prompt_tokens or left))

    @property
    def sampling(self) -> Sampling | None:
        """Settings for samples, of what `on` returns; None: no samples. Raises InputError."""
        assert self.seeds is not None and self.new_tokens is not None
        if not self.seeds:
            return None
        require_rouge()
        return Sampling(self.seeds, self.new_tokens, self.temperature, self.top_p,
                        self.no_repeat_ngram)

    def __str__(self) -> str:
        """The name and every value, on one line."""
        values = {key: value for key, value in asdict(self).items() if key != "name"}
        values["seeds"] = ",".join(map(str, self.seeds or ()))
        return f"{self.name}: " + " ".join(f"{key}={value}" for key, value in values.items())

    def cut(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's ids that are given to the model."""
        assert self.prompt_tokens is not None
        return list(prompt[:self.prompt_tokens] if self.keep == "first"
                    else prompt[-self.prompt_tokens:])


# MiniLLM's evaluation of Dolly, Self-Instruct, Vicuna, S-NI and UnNI, which DistiLLM, ABKD and AMiD
# took over: scripts/gpt2/eval/*.sh and data_utils/prompt_datasets.py (github.com/microsoft/LMOps,
# minillm). The limit of 10,000 prompts is UnNI's; the other sets are smaller. Theirs computes in
# fp16, whatever the checkpoint has: bf16 would round logits eight times as coarsely, fp32 does not.
PROTOCOLS: Mapping[str, EvalProtocol] = {
    "minillm": EvalProtocol("minillm", 512, PUBLISHED_SEEDS, 256, prompt_tokens=256, keep="first",
                            no_repeat_ngram=6, prompts=10_000, dtype="fp32")}


def eval_protocol(name: str | None, seq_length: int | None = None,
                  seeds: int | str | Sequence[int] | None = None, new_tokens: int | None = None,
                  no_repeat_ngram: int | None = None) -> EvalProtocol:
    """The protocol of this name, None for that of no paper, with what is not None in its place.

    seeds: their number, themselves, or as `--seeds` has them. Raises InputError.
    """
    if name is not None and name not in PROTOCOLS:
        raise InputError(f"--protocol {name!r}", f"one of {', '.join(PROTOCOLS)}",
                         suggest(name, list(PROTOCOLS)))
    published = EvalProtocol() if name is None else PROTOCOLS[name]
    protocol = replace(published,
                       seq_length=_given(seq_length, published.seq_length),
                       seeds=published.seeds if seeds is None else parse_seeds(seeds),
                       new_tokens=_given(new_tokens, published.new_tokens),
                       no_repeat_ngram=_given(no_repeat_ngram, published.no_repeat_ngram))
    if name is not None and protocol != published:
        protocol = replace(protocol, name=f"{name} (changed)")
    if not 2 <= protocol.seq_length < 1 << 31:
        raise InputError(f"--seq-length {protocol.seq_length}", "from 2 to 2147483647 tokens",
                         "give the length of the rows")
    return protocol


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def parse_seeds(seeds: int | str | Sequence[int]) -> tuple[int, ...]:
    """The seeds of `N`, the first N of 10, 20, …, or of `A,B,…`, these. Raises InputError."""
    text = str(seeds) if isinstance(seeds, int | str) else "".join(f"{seed}," for seed in seeds)
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
        if "," not in text:
            [count] = values
            values = [10 * number for number in range(1, count + 1)]
            if count < 0:
                raise ValueError
    except ValueError:
        values = [-1]
    if any(value < 0 for value in values) or len(set(values)) < len(values):
        raise InputError(f"--seeds {text}", "a number of samples per prompt, such as 5, or "
                         "different seeds, such as 10,20,30", "change --seeds")
    return tuple(values)


@dataclass(frozen=True)
class EvalArgs:
    """The arguments of `amid-ds eval`.

    data: a file, folder, glob or data set; rows: what is known of its rows. cached: instead of
    `teacher`, the folder of its distributions over these rows; data may then be their prepared
    folder too.
    """

    model: str
    teacher: str | None
    data: str
    protocol: EvalProtocol = field(default_factory=EvalProtocol)
    rows: RowOptions = field(default_factory=RowOptions)
    batch_size: int = 4
    trust_remote_code: bool = False
    cached: str | None = None
