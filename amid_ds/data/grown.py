"""A vocabulary that has grown: rows of new ids as the tokenizer before would write them.

The student's tokenizer extends its teacher's: equal ids up to the old end, new tokens behind it.
The teacher has to read the same text, so that each new id is replaced by its pieces, the old
tokenizer's ids of that token's text: a table, made once. What the two models say of the next token
belongs together at the last piece of what has been read. The pieces are not always those that the
old tokenizer would give the whole text, since it may join them with their neighbours; they spell
the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from amid_ds.data.batch import Batch, Documents
from amid_ds.data.joints import encode_continuations
from amid_ds.data.tokenizer import PROBE_TEXTS, encode_texts, vocabulary_size
from amid_ds.errors import InputError
from amid_ds.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SHOWN = 5


@dataclass(frozen=True)
class GrownVocabulary:
    """What the student's new ids are to the teacher.

    old: the number of ids that both have. pieces: of each id from `old` on, its old ids. limit:
    positions that the teacher has a table for; None: it computes them.
    """

    old: int
    pieces: tuple[tuple[int, ...], ...]
    limit: int | None = None

    @property
    def first_pieces(self) -> torch.Tensor:
        """[k] int64, the first old id of each new one."""
        return torch.tensor([pieces[0] for pieces in self.pieces])

    @property
    def sha256(self) -> str:
        """The hash by which a resumed run knows that these are still the same."""
        return hashlib.sha256(repr((self.old, self.pieces)).encode()).hexdigest()

    def spelled(self, token: int) -> tuple[int, ...]:
        """The old ids of one of the student's."""
        return self.pieces[token - self.old] if token >= self.old else (token,)

    def with_teachers_rows(self, batches: list[Batch]) -> list[Batch]:
        """The batches with `for_teacher`. On the host. Raises InputError, naming the row, for one
        with a text that is longer than the teacher's positions."""
        return [replace(batch, for_teacher=self.expand(batch)) for batch in batches]

    def expand(self, batch: Batch) -> Batch:
        """The batch with old ids alone; its `valid` are the places, in their order, at which the
        teacher has read what the student has at its own."""
        rows = [self._expand_row(batch, row) for row in range(len(batch.input_ids))]
        length = max(len(row.ids) for row in rows)
        ids, labels = (torch.full((len(rows), length), fill, dtype=torch.int64)
                       for fill in (0, IGNORE_INDEX))
        positions = torch.arange(length).repeat(len(rows), 1)
        for number, row in enumerate(rows):
            ids[number, :len(row.ids)] = torch.from_numpy(row.ids)
            labels[number, torch.from_numpy(row.ends)] = batch.labels[number, :len(row.ends)]
            for start in row.starts:
                positions[number, start:] = torch.arange(length - start)
        return Batch(ids, labels, None if batch.positions is None else positions,
                     ids.numel() - sum(len(row.ids) for row in rows), batch.rows, batch.sources,
                     Documents(tuple((*row.starts, len(row.ids)) for row in rows)),
                     batch.row_sources)

    def _expand_row(self, batch: Batch, number: int) -> _Row:
        tokens = batch.input_ids[number].numpy()
        starts = [0]
        if batch.documents is not None:
            # Without the padding.
            *starts, stop = batch.documents.starts[number]
            tokens = tokens[:stop]
        elif batch.positions is not None:
            starts = np.flatnonzero(batch.positions[number].numpy() == 0).tolist()
        parts = [self.spelled(token) for token in tokens.tolist()]
        ends = np.cumsum([len(part) for part in parts]) - 1
        ids = np.fromiter((piece for part in parts for piece in part), np.int64)
        firsts = [0 if start == 0 else int(ends[start - 1]) + 1 for start in starts]
        # Where positions begin anew.
        bounds = [0, len(ids)] if batch.positions is None else [*firsts, len(ids)]
        longest = int(np.diff(bounds).max())
        if self.limit is not None and longest > self.limit:
            raise InputError(f"{batch.sources[number]}: {longest} of the teacher's tokens in one "
                             f"text, and the teacher has {self.limit} positions",
                             f"at most {self.limit} of its tokens",
                             "lower train.seq_length; or choose a teacher whose positions are "
                             "computed")
        return _Row(ids, ends, firsts)


@dataclass(frozen=True)
class _Row:
    """ids: of the teacher. ends: [L] of the student's tokens, the place of the last piece. starts:
    the places at which documents begin."""

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    starts: list[int]


def grown_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase,
                     student_name: str, teacher_name: str, limit: int | None = None
                     ) -> GrownVocabulary:
    """The student's new tokens as the teacher's tokenizer spells them.

    limit: the teacher's positions, see GrownVocabulary. Raises InputError, showing the ids, unless
    the student's tokenizer is the teacher's with new tokens behind its own, and the teacher's
    spells each of them.
    """
    old, end = vocabulary_size(teacher), vocabulary_size(student)
    problems = _differences_below(old, student, teacher)
    if end <= old:
        problems.append(f"the student's ids end at {end - 1}, the teacher's at {old - 1}: no token "
                        "is new")
    pieces = [] if problems else [_pieces(student, teacher, i) for i in range(old, end)]
    problems += [f"the id {old + number} is {student.convert_ids_to_tokens(old + number)!r}, which "
                 "the teacher's tokenizer cannot spell"
                 for number, found in enumerate(pieces) if found is None]
    if problems:
        more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        lines = "\n".join(f"    {line}" for line in (*problems[:MOST_SHOWN], *more))
        raise InputError(f"the student's tokenizer ({student_name}) does not extend the teacher's "
                         f"({teacher_name}):\n{lines}",
                         "the teacher's tokenizer with further tokens behind its own",
                         "make it by add_tokens of the teacher's; without new tokens leave "
                         "teacher.vocabulary out")
    return GrownVocabulary(old, tuple(found for found in pieces if found is not None), limit)


def _differences_below(old: int, student: PreTrainedTokenizerBase,
                       teacher: PreTrainedTokenizerBase) -> list[str]:
    """A line for each id of the teacher's that is another token of the student's; or for the first
    probe without a new token that the two encode differently."""
    students, teachers = ({i: token for token, i in tokenizer.get_vocab().items()}
                          for tokenizer in (student, teacher))
    lines = [f"the id {i} is {students.get(i, '(no token)')!r}, of the teacher "
             f"{teachers.get(i, '(no token)')!r}"
             for i in range(old) if students.get(i) != teachers.get(i)]
    return lines or list(_other_probes(old, student, teacher))[:1]


def _other_probes(old: int, student: PreTrainedTokenizerBase,
                  teacher: PreTrainedTokenizerBase) -> Iterator[str]:
    for text in PROBE_TEXTS:
        ids, before = student(text)["input_ids"], teacher(text)["input_ids"]
        if max(ids, default=0) < old and ids != before:
            yield f"the text {text!r} becomes {ids}, of the teacher {before}"


def _pieces(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase,
            number: int) -> tuple[int, ...] | None:
    """The teacher's ids of the student's token `number`, None where they do not spell it.

    Its text is what it adds behind another: a first token may lose its space. Its pieces are those
    of the text by itself, or of the text behind another: a tokenizer may put a space before it.
    """
    before = encode_texts(teacher, ["a"])[0]

    def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else ""

    if student.convert_ids_to_tokens(number) is None:
        return None
    whole = decoded(student, [*before, number])
    text = whole[len(decoded(student, before)):]
    [(_, behind)] = encode_continuations(teacher, ["a"], [text])
    for pieces in (encode_texts(teacher, [text])[0], behind):
        if (pieces and teacher.unk_token_id not in pieces
                and decoded(teacher, [*before, *pieces]) == whole):
            return tuple(pieces)
    return None
