"""Tokenizers: opening them, telling them apart by what they produce, and training one with sentencepiece.

Two tokenizers of one size can give the same text different ids, and a student distilled over such a pair learns
noise without any error. So identity here is what a tokenizer produces: its vocabulary id by id, and the ids of probe
texts. A sentencepiece model is turned into a `tokenizers` one by a translation of our own, and refused where the probes
do not come out as sentencepiece's own, rather than by a converter that comes close.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN, END_OF_TEXT, PADDING = "<unk>", "</s>", "<pad>"
NORMAL, USER_DEFINED, BPE = 1, 4, 2          # kinds of pieces, and of model, in sentencepiece's protobuf

# Texts on which tokenizers differ: white space, code, digits, case, scripts, emoji, control characters.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\there, a line end\n\n\nand  trailing spaces   ",
    "def f(x: int) -> int:\n    if x > 0:\n        return x ** 2  # squared\n\treturn -x\r\n",
    "0 1 12 123 1234 12345 3.14159 1e-8 0xFF 2026-01-31",
    "camelCase snake_case SCREAMING_CASE kebab-case don't I'll we've",
    "naïve café Ærøskøbing Straße İstanbul ﬁ ① ½",
    "数据 データ 데이터 данные δεδομένα بيانات נתונים डेटा",
    "😀 👩‍👩‍👧‍👦 🇩🇰 e\u0301 \u200b \ufeff \u00a0|",
    "<s></s><|endoftext|><|im_start|>user<|im_end|>[INST]<pad>",
)


def load_tokenizer(model: str, revision: str | None = None,
                   trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, hub id or sentencepiece `.model` file. Raises InputError where there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model.endswith(".model") and Path(model).is_file():
        return from_sentencepiece(Path(model).read_bytes(), model)
    # For some architectures (Qwen2) AutoTokenizer puts a class of its own in place of the generic one that the folder
    # names, and with it another pre-tokenizer than tokenizer.json's. What was saved is what is meant.
    generic = _named_class(Path(model)) in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        opener = PreTrainedTokenizerFast if generic else AutoTokenizer
        return opener.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:     # transformers raises whatever its many loaders raise
        raise InputError(f"no tokenizer can be opened at {model!r}: {_first_line(error)}",
                         "a folder with tokenizer.json or another tokenizer's files, or a hub id that can be reached",
                         "check the path; save the tokenizer beside the model with tokenizer.save_pretrained") from None


def _named_class(folder: Path) -> str | None:
    """The tokenizer class that a local folder's tokenizer_config.json names, where there is also a tokenizer.json."""
    try:
        named: str | None = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if (folder / "tokenizer.json").is_file() else None


def end_of_text(tokenizer: PreTrainedTokenizerBase, named: str | None = None) -> int:
    """The id that ends a document: of the token `named`, or the tokenizer's own. InputError where it has none."""
    if named is not None:
        if named not in tokenizer.get_vocab():
            raise InputError(f"the end-of-text token {named!r}, which the tokenizer {tokenizer.name_or_path!r} does "
                             "not have", f"one token of its vocabulary, such as {tokenizer.eos_token!r}",
                             "name such a token as `end_of_text`, or leave it out")
        return int(tokenizer.get_vocab()[named])
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token",
                         "an `eos_token`, which is put between documents",
                         "set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def document_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text, such as Llama's <s>; nothing for GPT-2 or Qwen."""
    framed, plain = tokenizer("a")["input_ids"], encode(tokenizer, ["a"])[0]
    for cut in range(len(framed) - len(plain) + 1):
        if framed[cut:cut + len(plain)] == plain:
            return list(framed[:cut])
    return []


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text alone: nothing is put around it, nothing is cut.

    A `tokenizers` backend is asked directly: the wrapper's batch of offsets and masks costs a third of the time.
    """
    if not tokenizer.is_fast:
        slow: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return slow
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()                  # what a tokenizer.json may ask for, and the wrapper undoes too
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[list[int]]:
    """Prompts as prepared rows have them: what the tokenizer puts before a text, and the prompt's own ids."""
    front = document_front(tokenizer)
    return [front + ids for ids in encode(tokenizer, list(prompts))]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what the tokenizer produces: vocabulary with ids, special tokens' roles, the probes' ids."""
    produced = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "special": {role: str(token) for role, token in sorted(tokenizer.special_tokens_map.items())},
        "probes": [tokenizer(text)["input_ids"] for text in PROBES],
    }
    return hashlib.sha256(json.dumps(produced, ensure_ascii=True).encode()).hexdigest()


def require_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase,
                           student_name: str, teacher_name: str) -> None:
    """Raise InputError, showing the first difference, unless both give every text the same ids.

    The probes are compared first, since a text says more to the reader than an id; then the vocabularies, id by id.
    Which token plays the role of end-of-text may differ (a base model and its instruct version): the data is made
    by the student's tokenizer alone, and its ids mean the same to both.
    """
    difference = next(_differences(student, teacher), None)
    if difference is None:
        return
    what, ours, theirs = difference
    raise InputError(f"the student's tokenizer ({student_name}) and the teacher's ({teacher_name}) differ: {what}\n"
                     f"    student: {ours}\n    teacher: {theirs}",
                     "one tokenizer for both: the same ids for every text",
                     "choose a student and a teacher of one family, or train the student with the teacher's tokenizer")


def _differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Iterator[tuple[str, Any, Any]]:
    special = sorted({*student.all_special_tokens, *teacher.all_special_tokens})
    for text in (*PROBES, *special):
        ours, theirs = student(text)["input_ids"], teacher(text)["input_ids"]
        if ours != theirs:
            yield f"the text {text!r} becomes", ours, theirs
    token_of = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)]
    for i in range(max(map(max, token_of)) + 1):
        ours, theirs = (tokens.get(i, "(no token)") for tokens in token_of)
        if ours != theirs:
            yield f"the id {i} is", repr(ours), repr(theirs)


def train_sentencepiece(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Train a BPE tokenizer on `texts` and save it so that `AutoTokenizer.from_pretrained(folder)` opens it.

    Lossless: no normalisation, no dummy prefix, white space kept, bytes for what the alphabet lacks. The one
    exception is sentencepiece's own: U+2581, its sign for a space, decodes to a space. Special tokens are </s> and
    <pad>; their spelling inside a text is text (`split_special_tokens`). No beginning-of-text token.
    Raises InputError where the texts are too few for `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines(keepends=True))   # \n is a token of its own
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True, character_coverage=0.9995,
            user_defined_symbols=["\n", "\t"], unk_id=0, eos_id=1, pad_id=2, bos_id=-1,
            unk_piece=UNKNOWN, eos_piece=END_OF_TEXT, pad_piece=PADDING,
            max_sentence_length=1 << 30, num_threads=1, minloglevel=2)
    except (RuntimeError, OSError) as error:
        raise InputError(f"sentencepiece could not train {vocab_size} tokens: {_first_line(error)}",
                         "texts that hold more different pieces than `vocab_size`, which is at least 300 or so",
                         "give it more text, or another vocab_size") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model.getvalue())
    from_sentencepiece(model.getvalue(), str(folder)).save_pretrained(folder)


def from_sentencepiece(model: bytes, name: str) -> PreTrainedTokenizerBase:
    """A sentencepiece BPE model (its serialised protobuf) for the `tokenizers` library.

    Special tokens' spelling inside a text is text, as sentencepiece has it. Raises InputError where the bytes are no
    such model, or where a probe text does not come out as sentencepiece encodes it. Not for unigram models: where two
    segmentations are equally likely ("99" + "9", "9" + "99"), the two libraries choose differently.
    """
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
        own = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError) as error:
        raise InputError(f"{name} is not a sentencepiece model: {_first_line(error)}",
                         "a .model file as sentencepiece writes it", "check the file") from None
    if proto.trainer_spec.model_type != BPE:
        raise InputError(f"{name} is a sentencepiece model of another type than BPE", "one with model_type bpe",
                         "use the tokenizer.json that its author publishes")
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(proto, ids), unk_token=proto.trainer_spec.unk_piece,
                                     fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback))
    _add_white_space_rules(tokenizer, proto)
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and len(piece.piece) > 1]
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    roles = {"unk_token": own.unk_id(), "bos_token": own.bos_id(), "eos_token": own.eos_id(), "pad_token": own.pad_id()}
    special = {role: own.id_to_piece(i) for role, i in roles.items() if i >= 0}
    translated = PreTrainedTokenizerFast(tokenizer_object=tokenizer, split_special_tokens=True,
                                         clean_up_tokenization_spaces=False, **special)
    for text in PROBES:
        if translated(text)["input_ids"] != own.encode(text):
            raise InputError(f"{name} cannot be reproduced: sentencepiece encodes {text!r} as {own.encode(text)}, its "
                             f"translation as {translated(text)['input_ids']}", "a model with the usual rules for "
                             "white space and symbols", "use the tokenizer.json that its author publishes")
    return translated


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """sentencepiece joins any two neighbours whose union is a piece, the best score first: all such pairs, in order."""
    merges = []
    for i, piece in enumerate(proto.pieces):
        if piece.type == NORMAL:
            halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
            merges += [(-piece.score, i, ids[left], ids[right], left, right) for left, right in halves
                       if left in ids and right in ids]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_white_space_rules(tokenizer: Any, proto: Any) -> None:
    """Normalisation, the sign for a space, and their undoing. Set on `tokenizer` in place."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", "▁"))
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    pieces = [piece.piece for piece in proto.pieces]
    if not any("▁" in piece.lstrip("▁") or "\n" in piece[1:] for piece in pieces):
        # No piece goes on after a run of spaces, or spans a line end: words are encoded alone, and cached.
        word = r"\n|▁+[^▁\n]*|[^▁\n]+" if "\n" in pieces else r"▁+[^▁]*|[^▁]+"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
