"""The recipe's JSON Schema, by which editors complete and check it.

It takes whatever `load_recipe` takes. What it cannot say, `load_recipe` refuses alone: rules about
several keys, the values of a schedule, a whole number written as `8.0`.
"""

from __future__ import annotations

import re
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
