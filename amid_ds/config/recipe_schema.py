"""The recipe's JSON Schema, by which editors complete and check it.

It takes whatever `load_recipe` takes. What it cannot say, `load_recipe` refuses alone: rules about
several keys, the values of a schedule, a whole number written as `8.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from amid_ds.config.library import packaged_folder
from amid_ds.config.recipe import Recipe


class _SchemaWithoutTitles(GenerateJsonSchema):
    """A key's title would be its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe's file."""
    schema = Recipe.model_json_schema(schema_generator=_SchemaWithoutTitles)
    configs = sorted(packaged_folder("ds_configs").glob("*.json"))
    schema["properties"]["deepspeed"]["examples"] = [f"ds_configs/{path.name}" for path in configs]
    _use_yamls_words(schema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema,
            "title": "Recipe of amid_ds"}


def _use_yamls_words(node: object) -> None:
    """Write descriptions in one line, and `null` for None in them."""
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _use_yamls_words(part)
    if isinstance(node, dict) and isinstance(text := node.get("description"), str):
        node["description"] = re.sub(r"\bNone\b", "null", " ".join(text.split()))


def recipe_keys() -> dict[str, list[str]]:
    """Every key that an override `a.b=c` may name, with the values that are known beforehand.

    Of a list of sections the first one's; no keys of a schedule, which is written as a whole.
    """
    schema = recipe_schema()
    return dict(_keys_below(schema, schema["$defs"], ""))


def _keys_below(node: dict[str, Any], sections: dict[str, Any], key: str
                ) -> Iterator[tuple[str, list[str]]]:
    """(dotted key, known values) of what the schema `node` of `key` takes."""
    kinds = list(_kinds(node, sections))
    values = {word for kind in kinds for word in _known_values(kind)}
    values |= {word for word in node.get("examples", ()) if isinstance(word, str)}
    inner = [part for kind in kinds for part in (kind, kind.get("items", {}))]
    properties = {name: part for kind in inner
                  for section in _kinds(kind, sections)
                  for name, part in section.get("properties", {}).items()}
    is_scalar = any(kind.get("type") in ("number", "string", "integer") for kind in kinds)
    if key and (values or is_scalar or not properties):
        yield key, sorted(values)
    if not is_scalar:
        infix = "0." if any("items" in kind for kind in kinds) else ""
        for name, part in properties.items():
            yield from _keys_below(part, sections, f"{key}.{infix}{name}" if key else name)


def _kinds(node: dict[str, Any], sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas of which a value takes one."""
    if "$ref" in node:
        node = sections[node["$ref"].rpartition("/")[2]]
    parts = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    for part in parts:
        yield from _kinds(part, sections)
    if not parts:
        yield node


def _known_values(kind: dict[str, Any]) -> list[str]:
    if kind.get("type") == "boolean":
        return ["true", "false"]
    if kind.get("type") == "null":
        return ["null"]
    return kind.get("enum", [kind["const"]] if "const" in kind else [])
