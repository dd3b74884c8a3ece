"""Tokenizers: opening them, comparing them by their output, training one with sentencepiece.

Two tokenizers of one size can give the same text different ids, and a student distilled over such
a pair learns noise without any error. So two tokenizers are equal here if their output is: the
vocabulary id by id, and the ids of probe texts. A sentencepiece model is translated for the
`tokenizers` library by our own code, and refused if the probes' ids are not sentencepiece's own:
converters come close, and a difference of a few ids would go unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amid_ds.errors import InputError
from amid_ds.files.ownership import new_folder, require_new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As transformers and llama.cpp name a sentencepiece model.
SENTENCEPIECE_FILE = "tokenizer.model"
UNK_TOKEN, EOS_TOKEN, PAD_TOKEN = "<unk>", "</s>", "<pad>"
# Types of pieces and of models in sentencepiece's protobuf.
PIECE_NORMAL, PIECE_USER_DEFINED, MODEL_BPE = 1, 4, 2

# Texts on which tokenizers differ: white space, code, digits, case, scripts, emoji, control
# characters.
PROBE_TEXTS = (
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
    """The tokenizer of a model folder, hub id or sentencepiece `.model` file.

    Raises InputError if it cannot be opened.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model.endswith(".model") and Path(model).is_file():
        return tokenizer_from_sentencepiece(Path(model).read_bytes(), model)
    # For some architectures (Qwen2) AutoTokenizer opens its own class instead of the generic one
    # that the folder names, with another pre-tokenizer than tokenizer.json's. The saved one is
    # meant.
    generic = _saved_class(Path(model)) in ("TokenizersBackend", "PreTrainedTokenizerFast")
    opener = PreTrainedTokenizerFast if generic else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = opener.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _processors_template(model, revision)
        return tokenizer
    except Exception as error:
        # transformers raises whatever its many loaders raise.
        raise InputError(f"no tokenizer can be opened at {model!r}: {_first_line(error)}",
                         "a folder with tokenizer.json or another tokenizer's files, or a hub id "
                         "that can be reached",
                         "check the path; save the tokenizer beside the model with "
                         "tokenizer.save_pretrained") from None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path,
                   revision: str | None = None) -> None:
    """Save a tokenizer that load_tokenizer has opened, with the sentencepiece model beside it.

    revision: as it was opened. transformers leaves the model out; converters read its scores.
    """
    from transformers.utils import cached_file

    tokenizer.save_pretrained(folder)
    pieces = cached_file(tokenizer.name_or_path, SENTENCEPIECE_FILE, revision=revision,
                         _raise_exceptions_for_missing_entries=False,
                         _raise_exceptions_for_connection_errors=False)
    if pieces is not None:
        shutil.copy(pieces, folder / SENTENCEPIECE_FILE)


def _processors_template(model: str, revision: str | None) -> str | None:
    """The chat template in the file of a multimodal model's processor, which tokenizers ignore."""
    from transformers.utils import cached_file

    file = cached_file(model, "chat_template.json", revision=revision,
                       _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)
    if file is None:
        return None
    template: str = json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]
    return template


def _saved_class(folder: Path) -> str | None:
    """The class that a local folder's tokenizer_config.json names.

    None without it, or without a tokenizer.json.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        name: str | None = config["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if (folder / "tokenizer.json").is_file() else None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1: the distributions of both models are over the ids below it.

    Not the number of tokens: ids may have holes, as cl100k's have. A hole counts like a token.
    """
    return max(tokenizer.get_vocab().values()) + 1


def end_of_text_id(tokenizer: PreTrainedTokenizerBase, named: str | None = None) -> int:
    """The id of the token that ends a document: the token `named`, or the tokenizer's eos_token.

    Raises InputError if the tokenizer lacks it.
    """
    if named is not None:
        if named not in tokenizer.get_vocab():
            raise InputError(f"the end-of-text token {named!r}, which the tokenizer "
                             f"{tokenizer.name_or_path!r} does not have",
                             f"one token of its vocabulary, such as {tokenizer.eos_token!r}",
                             "name such a token as `end_of_text`, or leave it out")
        return int(tokenizer.get_vocab()[named])
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token",
                         "an `eos_token`, which is put between documents",
                         "set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def document_prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text: Llama's <s>, none for GPT-2 or Qwen."""
    framed, plain = tokenizer("a")["input_ids"], encode_texts(tokenizer, ["a"])[0]
    for cut in range(len(framed) - len(plain) + 1):
        if framed[cut:cut + len(plain)] == plain:
            return list(framed[:cut])
    return []


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text by itself, without special tokens around it and without truncation.

    A `tokenizers` backend is called directly: the wrapper's batch of offsets and masks costs a
    third of the time.
    """
    if not tokenizer.is_fast:
        slow: list[list[int]] = tokenizer(texts, add_special_tokens=False,
                                          verbose=False)["input_ids"]
        return slow
    backend = tokenizer.backend_tokenizer
    # A tokenizer.json may ask for both; the wrapper undoes them too.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[list[int]]:
    """Ids of each prompt as in prepared rows: the tokenizer's own prefix, and the prompt's ids."""
    prefix = document_prefix_ids(tokenizer)
    return [prefix + ids for ids in encode_texts(tokenizer, list(prompts))]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's output: vocabulary with ids, special tokens' roles, probes' ids."""
    output = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "special": {role: str(token)
                    for role, token in sorted(tokenizer.special_tokens_map.items())},
        "probes": [tokenizer(text)["input_ids"] for text in PROBE_TEXTS],
    }
    return hashlib.sha256(json.dumps(output, ensure_ascii=True).encode()).hexdigest()


def require_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase,
                           student_name: str, teacher_name: str) -> None:
    """Raise InputError, showing the first difference, unless both give every text the same ids.

    The probes are compared first, since a text says more to the reader than an id; then the
    vocabularies, id by id. The end-of-text tokens may differ (a base model and its instruct
    version): the student's tokenizer alone prepares the data, and its ids mean the same to both.
    """
    difference = next(_differences(student, teacher), None)
    if difference is None:
        return
    subject, student_value, teacher_value = difference
    raise InputError(f"the student's tokenizer ({student_name}) and the teacher's ({teacher_name}) "
                     f"differ: {subject}\n"
                     f"    student: {student_value}\n    teacher: {teacher_value}",
                     "one tokenizer for both: the same ids for every text",
                     "choose a student and a teacher of one family, or train the student with the "
                     "teacher's tokenizer")


def _differences(student: PreTrainedTokenizerBase,
                 teacher: PreTrainedTokenizerBase) -> Iterator[tuple[str, object, object]]:
    """(subject, the student's value, the teacher's) of each difference."""
    special = sorted({*student.all_special_tokens, *teacher.all_special_tokens})
    for text in (*PROBE_TEXTS, *special):
        student_ids, teacher_ids = student(text)["input_ids"], teacher(text)["input_ids"]
        if student_ids != teacher_ids:
            yield f"the text {text!r} becomes", student_ids, teacher_ids
    students, teachers = ({i: token for token, i in tokenizer.get_vocab().items()}
                          for tokenizer in (student, teacher))
    for i in range(max(max(students), max(teachers)) + 1):
        student_token, teacher_token = (tokens.get(i, "(no token)")
                                        for tokens in (students, teachers))
        if student_token != teacher_token:
            yield f"the id {i} is", repr(student_token), repr(teacher_token)


def train_sentencepiece(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Train a BPE tokenizer on `texts` and save it in `folder`, for AutoTokenizer to open.

    Lossless: no normalisation, no dummy prefix, white space kept, bytes for characters without a
    token. The one exception is sentencepiece's own: U+2581, its sign for a space, decodes to a
    space. Special tokens are </s> and <pad>; their spelling inside a text is text
    (`split_special_tokens`). No beginning-of-text token.
    Raises InputError if the texts are too few for `vocab_size`, or the folder is not new or empty.
    """
    import sentencepiece

    # Before the training, which takes minutes.
    require_new_folder(folder, "the tokenizer's folder")
    model = io.BytesIO()
    # The line end is a token by itself.
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, allow_whitespace_only_pieces=True, split_digits=True,
            byte_fallback=True, character_coverage=0.9995, user_defined_symbols=["\n", "\t"],
            unk_id=0, eos_id=1, pad_id=2, bos_id=-1,
            unk_piece=UNK_TOKEN, eos_piece=EOS_TOKEN, pad_piece=PAD_TOKEN,
            max_sentence_length=1 << 30, num_threads=1, minloglevel=2)
    except InputError:
        raise
    # ValueError: a size beyond 32 bits.
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"sentencepiece could not train {vocab_size} tokens: {_first_line(error)}",
                         "texts that hold more different pieces than `vocab_size`, which is at "
                         "least 300 or so",
                         "give it more text, or another vocab_size") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as staging:
        (staging / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
        tokenizer_from_sentencepiece(model.getvalue(), str(folder)).save_pretrained(staging)


def tokenizer_from_sentencepiece(model: bytes, name: str) -> PreTrainedTokenizerBase:
    """A sentencepiece BPE model (its serialised protobuf) translated for `tokenizers`.

    name: for messages. Special tokens' spelling inside a text is text, as in sentencepiece. Raises
    InputError if the bytes are no such model, or if a probe text gets other ids than from
    sentencepiece. Not for unigram models: between two equally likely segmentations ("99" + "9",
    "9" + "99") the two libraries choose differently.
    """
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
        own = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError) as error:
        raise InputError(f"{name} is not a sentencepiece model: {_first_line(error)}",
                         "a .model file as sentencepiece writes it", "check the file") from None
    if proto.trainer_spec.model_type != MODEL_BPE:
        raise InputError(f"{name} is a sentencepiece model of another type than BPE",
                         "one with model_type bpe",
                         "use the tokenizer.json that its author publishes")
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(proto, ids),
                                     unk_token=proto.trainer_spec.unk_piece, fuse_unk=True,
                                     byte_fallback=proto.trainer_spec.byte_fallback))
    _add_white_space_rules(tokenizer, proto)
    symbols = [piece.piece for piece in proto.pieces
               if piece.type == PIECE_USER_DEFINED and len(piece.piece) > 1]
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    roles = {"unk_token": own.unk_id(), "bos_token": own.bos_id(), "eos_token": own.eos_id(),
             "pad_token": own.pad_id()}
    special = {role: own.id_to_piece(i) for role, i in roles.items() if i >= 0}
    # The last two are for llama.cpp, which would put a token and a space before every text; this
    # post-processor changes no id, and says to its converter that no token is put there.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    translated = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, split_special_tokens=True, clean_up_tokenization_spaces=False,
        **special, add_prefix_space=proto.normalizer_spec.add_dummy_prefix)
    for text in PROBE_TEXTS:
        ids_here, ids_there = translated(text)["input_ids"], own.encode(text)
        if ids_here != ids_there:
            raise InputError(f"{name} cannot be reproduced: sentencepiece encodes {text!r} as "
                             f"{ids_there}, its translation as {ids_here}",
                             "a model with the usual rules for white space and symbols",
                             "use the tokenizer.json that its author publishes")
    return translated


def _merges(proto: Any, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a piece, in the order in which sentencepiece joins them.

    It joins any two neighbours whose union is a piece, the best score first.
    """
    merges = []
    for i, piece in enumerate(proto.pieces):
        if piece.type == PIECE_NORMAL:
            text = piece.piece
            halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            merges += [(-piece.score, i, ids[left], ids[right], left, right)
                       for left, right in halves if left in ids and right in ids]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_white_space_rules(tokenizer: Any, proto: Any) -> None:
    """Set the normalisation, the sign for a space, and their undoing on `tokenizer`, in place."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
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
        # No piece continues after a run of spaces, or spans a line end: words are encoded one by
        # one, and cached.
        word = r"\n|▁+[^▁\n]*|[^▁\n]+" if "\n" in pieces else r"▁+[^▁]*|[^▁]+"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
