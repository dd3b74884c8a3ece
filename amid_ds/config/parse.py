"""From a YAML file and overrides to a recipe: all problems in one message."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from amid_ds.config.recipe import (
    VALUE_KINDS,
    Loss,
    Recipe,
    Section,
)
from amid_ds.errors import (
    InputError,
    suggest,
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Defaults, then the YAML file at `path`, then `a.b=c` overrides. Raises one InputError with all that is wrong."""
    return _validated(_read_with_overrides(path, overrides), f"the recipe {path}")


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe that `dump_recipe` wrote as `text`. Raises InputError, with `name` for it, where an older version did
    and its keys are others by now."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError:
        raw = None
    return _validated(raw if isinstance(raw, dict) else {}, name)


def _validated(raw: dict[str, Any], name: str) -> Recipe:
    problems = list(_unknown_loss_keys(raw.get("loss")))
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [*_error_lines(error), *problems]
    else:
        if not problems:
            return recipe
    raise InputError(
        f"{name} has {len(problems)} problem(s):\n" + "\n".join(f"    - {line}" for line in problems),
        "a recipe as in the README, with keys and values of these names and ranges",
        "mend the lines above; the command line's key=value comes last and wins",
    )


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every key's value, as YAML has them."""
    values = recipe.model_dump(mode="json")
    if recipe.loss.preset is not None:       # a preset brings its own values: only what was set beside it is kept
        values["loss"] = recipe.loss.model_dump(mode="json", exclude_unset=True)
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it again gives an equal recipe."""
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True)


def merge_overrides(path: str | Path, overrides: Sequence[str]) -> str:
    """The YAML file at `path` with the overrides in it, and no default: to be overridden as the file can be."""
    return yaml.safe_dump(_read_with_overrides(path, overrides), sort_keys=False, allow_unicode=True)


def _read_with_overrides(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}", "a YAML file", "check the path") from None
    except yaml.YAMLError as error:
        raise InputError(f"the recipe {path} is not YAML: {error}", "a YAML file", "mend that line") from None
    if not isinstance(raw, dict):
        raise InputError(f"the recipe {path} holds a {type(raw).__name__}", "a mapping of sections such as `student:`",
                         "start from the recipe in the README")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"the argument {override!r}", "an override of the form a.b=value", "e.g. train.steps=100")
    *sections, leaf = key.split(".")
    node: Any = raw
    for section in sections:
        if isinstance(node, list) and section.isdigit() and int(section) < len(node):
            node = node[int(section)]
            continue
        if not isinstance(node, dict):
            raise InputError(f"the override {override!r} reaches into {section!r}, which is not a section",
                             "a.b=value where a is a section of the recipe", "check the key")
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"the override {override!r}", "a value in YAML", "quote it for the shell") from None
    if not isinstance(node, dict):
        raise InputError(f"the override {override!r} sets a key of {'.'.join(sections)!r}, which is not a section",
                         "a.b=value where a is a section of the recipe", "check the key")
    node[leaf] = parsed


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """The keys that the section at `location` (a pydantic error's, less its last part) knows."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, Section) else None
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
    return list(model.model_fields) if model is not None else []


def _error_lines(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        location = [part for part in problem["loc"] if part not in VALUE_KINDS]
        name = ".".join(str(part) for part in location) or "recipe"
        if problem["type"] == "extra_forbidden":
            lines.append(f"`{name}` is unknown; {suggest(str(location[-1]), _known_keys(location[:-1]))}")
        elif problem["type"] == "missing":
            lines.append(f"`{name}` is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = problem["input"]
            value = "" if isinstance(found, (Mapping, Section)) else f": found {found!r}"
            lines.append(f"`{name}`{value}; {message}")
    return lines


def _unknown_loss_keys(loss: Any) -> Iterator[str]:
    """A preset may have keys of its own; without one the section is closed. Numbers among them must be finite."""
    if not isinstance(loss, dict):
        return
    known = list(Loss.model_fields)
    for key in loss.keys() - set(known):
        if loss.get("preset") is None:
            yield f"`loss.{key}` is unknown; {suggest(key, known)}"
        elif isinstance(loss[key], float) and not math.isfinite(loss[key]):
            yield f"`loss.{key}`: found {loss[key]!r}; a preset's numbers are finite"
