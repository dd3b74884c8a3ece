"""YAML and JSON as their standards have them, and no further: the readers of all that users write.

Numbers and booleans are YAML 1.2's: `yes`, `on`, `1:30` and `010` are text, `1e-4` is a number. A
key that is there twice is an error, because one of its two values would be lost; so is a file that
grows, by its aliases or its depth, beyond what anybody writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

# Bounds of a file: bytes, mappings inside one another, values once its aliases are followed.
MAX_BYTES = 4_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2.2, section 10.3.2, but for numbers that begin with zeros: some read
# `010` as 8, some as 10. Each with the characters that its values begin with.
_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
              r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", [*"-+.0123456789"]),
    "merge": (r"<<", ["<"]),
}
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _name, (_pattern, _starts) in _SCHEMA.items():
    for _start in _starts:
        _RESOLVERS.setdefault(_start, []).append((_TAG + _name, re.compile(f"(?:{_pattern})$")))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS
    # No dates, sets, pairs or bytes, which no recipe has.
    yaml_constructors: ClassVar = {tag: yaml.SafeLoader.yaml_constructors[tag]
                                   for tag in (_TAG + "str", _TAG + "seq", _TAG + "map", None)}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_DEPTH} levels inside one another",
                self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_document(self) -> Any:
        document = super().compose_document()
        self._require_sound(document, {})
        return document

    def _require_sound(self, node: Any, sizes: dict[int, int]) -> int:
        """The number of values under `node` with every alias followed; `sizes` has those known."""
        if id(node) in sizes:
            # 0: the node is being counted, so it holds itself.
            if not sizes[id(node)]:
                raise yaml.composer.ComposerError(None, None, "a value that holds itself",
                                                  node.start_mark)
            return sizes[id(node)]
        sizes[id(node)], size = 0, 1
        if isinstance(node, yaml.CollectionNode):
            for child in node.value:
                size += sum(self._require_sound(part, sizes)
                            for part in (child if isinstance(child, tuple) else (child,)))
        elif any("\ud800" <= character <= "\udfff" for character in node.value):
            raise yaml.composer.ComposerError(None, None, "half of a character", node.start_mark)
        if size > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_VALUES} values, its aliases followed", node.start_mark)
        sizes[id(node)] = size
        return size

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if (key.tag, str(key.value)) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_plain(self, node: yaml.ScalarNode) -> object:
        """null, a boolean or a number; also under a tag such as `!!int`, before any text."""
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(_SCHEMA[kind][0], text):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not a YAML {kind}",
                                                    node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            # Python converts no more than 4,300 digits; a longer text is no number to anybody.
            return int(text, 0) if len(text) < 100 else text
        return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))


for _name in ("null", "bool", "int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.construct_plain)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for something else."""

    yaml_implicit_resolvers = _RESOLVERS


def load_yaml(text: str) -> object:
    """The one document in `text`. Raises ValueError with the line and the fault."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def dump_yaml(value: object) -> str:
    """`value` as YAML, keys in their order; `load_yaml` gives an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_json(text: str) -> object:
    """The value in `text`. Raises ValueError for what is not JSON, such as NaN, or a number beyond
    all floats, or a key that is there twice."""
    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a number in JSON")
        return value

    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=finite,
                          parse_constant=finite)
    except RecursionError:
        raise ValueError("its values lie too deep inside one another") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The mapping of `pairs`. Raises ValueError for a key that is there twice."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return mapping


def read_user_file(path: Path) -> str:
    """The text of a file that a user wrote. Raises OSError, or ValueError where it is no text."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    # With or without the mark that some editors put before the first character.
    return data.decode("utf-8-sig")


def type_problem(kind: Any, constraints: Sequence[object], value: object) -> str | None:
    """What keeps a value out of JSON from being a `kind` under pydantic's constraints; or None."""
    for constraint in constraints:
        kind = Annotated[kind, constraint]
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return None
