"""The tokens at which a causal LM ends its text: its own list, and the tokenizer's.

Chat models name several in generation_config.json, such as the end of a turn and that of a
document, of which a tokenizer knows one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from amid_ds.data import end_of_text_id
from amid_ds.errors import InputError
from amid_ds.models.loading import stored_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def end_ids(own: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase,
            named: str | None = None) -> tuple[int, ...]:
    """The ids that end a text: the token `named` alone, or the tokenizer's and the model's `own`.

    Raises InputError if there is none, or one that is no id.
    """
    listed: Any = None if own is None else own.eos_token_id
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if named is not None or not ids:
        return (end_of_text_id(tokenizer, named),)
    if bad := [each for each in ids if not isinstance(each, int) or each < 0]:
        raise InputError(f"the model's generation settings name {bad[0]!r} as an end of text",
                         "ids of tokens", "correct eos_token_id in its generation_config.json")
    if tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids]
    return tuple(dict.fromkeys(ids))


def generation_config(model: str, revision: str | None = None,
                      trust_remote_code: bool = False) -> GenerationConfig:
    """A model's generation settings, without its weights: of generation_config.json, or else of
    config.json, as transformers has it. Raises InputError if they cannot be read."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError, TypeError) as error:
        file = Path(model) / "generation_config.json"
        if file.exists():
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{file} cannot be read: {reason}",
                             "a JSON object of generation settings",
                             "correct it, or remove it: config.json's are taken then") from None
    return GenerationConfig.from_model_config(stored_config(model, revision, trust_remote_code))
