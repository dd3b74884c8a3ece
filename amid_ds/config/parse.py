"""From a YAML file and overrides to a recipe: all problems in one message."""

from __future__ import annotations

import copy
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from amid_ds.config.model_sections import TEACHER_SECTIONS
from amid_ds.config.recipe import (
    SAMPLED_REVERSE_KL,
    Loss,
    OwnLoss,
    Recipe,
    Section,
    Source,
)
from amid_ds.config.scheduled_values import VALUE_KINDS, VALUE_SECTIONS
from amid_ds.config.strict import dump_yaml, load_yaml, read_user_file
from amid_ds.errors import InputError, suggest

# After pydantic's words for a value of another type.
HINTS = {"string_type": ", in quotes if it looks like a number", "bool_type": ": true or false",
         "list_type": ", as [A, B]", "tuple_type": ", as [0.0, 1.0]"}
# Parts of a problem's place that are no key, and the sections that some of them are.
KINDS = {**dict.fromkeys(VALUE_KINDS), **VALUE_SECTIONS, **TEACHER_SECTIONS}
# And pydantic's own words for the ways of one that may be a word or something else.
WAY = re.compile(r"literal\[.*\]|list\[.*\]|constrained-\w+")
# Shows the beginning and the end of a value that is too long for a message.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80

# A recipe as YAML has it, before or after its check: sections and values by key.
RawRecipe = dict[str, Any]
# What a function takes for a recipe: the path of its file, the file's content, or a loaded one.
RecipeLike: TypeAlias = str | Path | Mapping[str, Any] | Recipe


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe from defaults, then the YAML file at the path `recipe`, then `a.b=c` overrides.

    recipe: or the file's content as a mapping, or a Recipe. Raises one InputError with all
    problems.
    """
    name = f"the recipe {recipe}" if isinstance(recipe, (str, Path)) else "the recipe"
    return _validated(_read_with_overrides(recipe, overrides), name)


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe that `dump_recipe` wrote as `text`.

    Raises InputError, which calls it `name`, if the keys are not those of this version.
    """
    try:
        raw = load_yaml(text)
    except ValueError:
        raw = None
    return _validated(raw if isinstance(raw, dict) else {}, name)


def _validated(raw: RawRecipe, name: str) -> Recipe:
    problems = [*_unknown_loss_keys(raw), *_streamed_epochs(raw)]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [*error_lines(error), *problems]
    else:
        if not problems:
            return recipe
    lines = "\n".join(f"    - {line}" for line in problems)
    raise InputError(
        f"{name} has {len(problems)} problem(s):\n{lines}",
        "a recipe as in amid_ds/config/README.md, with keys and values of these names and ranges",
        "fix the lines above; the command line's key=value comes last and wins")


def source_of(values: Mapping[str, str]) -> Source:
    """The source that a command's options describe, by the keys of a recipe's source.

    Raises InputError with all problems.
    """
    try:
        return Source.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(error_lines(error)), "a source as in a recipe's data.train",
                         "change the options that name it") from None


def resolved(recipe: Recipe) -> RawRecipe:
    """Every key of the recipe with its value."""
    values = recipe.model_dump(mode="json")
    if recipe.loss.preset is not None:
        # A preset brings its own values: defaults of the objective's keys would override them.
        values["loss"] = recipe.loss.model_dump(mode="json", exclude_unset=True)
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it again gives an equal recipe."""
    return dump_yaml(resolved(recipe))


def merge_overrides(path: str | Path, overrides: Sequence[str]) -> str:
    """The YAML file at `path` with the overrides applied and no default filled in."""
    return dump_yaml(_read_with_overrides(path, overrides))


def named_value(path: str | Path, overrides: Sequence[str], key: str) -> object:
    """The value of a dotted key in the YAML file at `path` with the overrides; None: it has none.

    Raises InputError where the file cannot be read.
    """
    node: object = _read_with_overrides(path, overrides)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _read_with_overrides(recipe: RecipeLike, overrides: Sequence[str]) -> RawRecipe:
    if isinstance(recipe, (str, Path)):
        raw = _read_yaml(Path(recipe))
    elif isinstance(recipe, Recipe):
        raw = resolved(recipe)
    elif isinstance(recipe, Mapping):
        raw = copy.deepcopy(dict(recipe))
    else:
        raise InputError(f"a recipe of type {type(recipe).__name__}",
                         "the path of a YAML file, its content as a mapping, or a Recipe",
                         "give one of them")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply_override(raw, override)
    return raw


def _read_yaml(path: Path) -> RawRecipe:
    try:
        text = read_user_file(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}",
                         "a YAML file, its text in UTF-8", "check the path and the file") from None
    try:
        raw = load_yaml(text)
    except ValueError as error:
        raise InputError(f"the recipe {path} is not YAML: {error}", "a YAML file",
                         "fix that line") from None
    if not isinstance(raw, dict):
        raise InputError(f"the recipe {path} holds a {type(raw).__name__}",
                         "a mapping of sections such as `student:`",
                         "start from the recipe in the README")
    return raw


def _apply_override(raw: RawRecipe, override: str) -> None:
    """Set the value of `a.b=value` in `raw`; missing sections are made, list items go by number."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"the argument {override!r}", "an override of the form a.b=value",
                         "e.g. train.steps=100")
    *sections, leaf = key.split(".")
    node: Any = raw
    for section in sections:
        if isinstance(node, list) and section in map(str, range(len(node))):
            node = node[int(section)]
            continue
        if not isinstance(node, dict):
            raise _no_section(override, f"reaches into {section!r}")
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
    try:
        parsed = load_yaml(value)
    except ValueError as error:
        raise InputError(f"the override {override!r} has a value that is not YAML: {error}",
                         "a value in YAML", "quote it for the shell") from None
    if not isinstance(node, dict):
        raise _no_section(override, f"sets a key of {'.'.join(sections)!r}")
    node[leaf] = parsed


def _no_section(override: str, problem: str) -> InputError:
    return InputError(f"the override {override!r} {problem}, which is not a section",
                      "a.b=value where a is a section of the recipe", "check the key")


def default_of(key: str) -> object:
    """The value that a dotted key of the recipe has where none is given; None if it must be."""
    *location, name = key.split(".")
    section = _section_at([part for part in location if not part.isdigit()])
    field = section.model_fields.get(name) if section is not None else None
    # What a loss in another's place does not name is as the other has it.
    if field is None or field.is_required() or section is OwnLoss:
        return None
    return field.get_default(call_default_factory=True)


def _known_keys(location: Sequence[int | str], root: type[Section]) -> list[str]:
    """The keys of the section at `location` in `root`, a path of keys and list indices as pydantic
    has it; or []."""
    section = (KINDS[str(location[-1])] if location and location[-1] in KINDS
               else _section_at([part for part in location
                                 if isinstance(part, str) and part not in KINDS], root))
    return list(section.model_fields) if section is not None else []


def _section_at(location: Sequence[str], root: type[Section] = Recipe) -> type[Section] | None:
    """The class of the section at a path of keys in `root`; None where there is no section."""
    section: type[Section] | None = root
    for part in location:
        field = section.model_fields.get(part) if section is not None else None
        if field is None:
            return None
        section = next(_sections_in(field.annotation), None)
    return section


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    """The section classes that a key may hold, in their order."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _sections_in(part)


def error_lines(error: ValidationError, root: type[Section] = Recipe, whole: str = "recipe"
                ) -> list[str]:
    """One line for each value of a `root`, called `whole`, that pydantic has problems with."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        location = [part for part in problem["loc"]
                    if part not in KINDS and not WAY.fullmatch(str(part))]
        name = ".".join(str(part) for part in location) or whole
        if problem["type"] == "extra_forbidden":
            suggestion = suggest(str(location[-1]), _known_keys(problem["loc"][:-1], root))
            lines[f"`{name}` is unknown"] = suggestion
        elif problem["type"] == "missing":
            lines[f"`{name}` is missing"] = ""
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "model_type":
                message = f"a section of the keys {', '.join(_known_keys(problem['loc'], root))}"
            value = problem["input"]
            shown = "" if isinstance(value, (Mapping, Section)) else f": found {_SHORT.repr(value)}"
            place, message = f"`{name}`{shown}", f"{message}{HINTS.get(problem['type'], '')}"
            lines[place] = f"{lines[place]}; or: {message}" if place in lines else message
    return [f"{place}; {message}" if message else place for place, message in lines.items()]


def _streamed_epochs(raw: RawRecipe) -> Iterator[str]:
    """A line where `train.epochs` counts the rows of streamed sources.

    Here, because it is about two sections: pydantic compares them only where both are right.
    """
    train, data = raw.get("train"), raw.get("data")
    sources = data.get("train") if isinstance(data, dict) else None
    if isinstance(train, dict) and train.get("epochs") is not None and isinstance(sources, list):
        for source in sources:
            if isinstance(source, dict) and source.get("stream") is True:
                yield (f"`train.epochs`: found {_SHORT.repr(train['epochs'])}; the rows of "
                       f"{_SHORT.repr(source.get('path'))} are streamed, and nobody has counted "
                       "them: name `train.steps`, or prepare the data")
                return


def _unknown_loss_keys(raw: RawRecipe) -> Iterator[str]:
    """A line for each extra key of a `loss` without a preset, or extra number that is not finite.

    The recipe's own, and those of sources and rollouts, which may have its preset.
    """
    whole, data, rollout = raw.get("loss"), raw.get("data"), raw.get("rollout")
    preset = whole.get("preset") if isinstance(whole, dict) else None
    # Each with the preset that it has if it names none.
    places: dict[str, tuple[object, object]] = {"loss": (whole, None)}
    if isinstance(rollout, dict):
        sampled = rollout.get("estimator") == "sampled"
        places["rollout.loss"] = rollout.get("loss"), SAMPLED_REVERSE_KL if sampled else preset
    sources = data.get("train") if isinstance(data, dict) else None
    for number, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            places[f"data.train.{number}.loss"] = source.get("loss"), preset
    for place, (loss, preset) in places.items():
        if not isinstance(loss, dict):
            continue
        known = list((Loss if place == "loss" else OwnLoss).model_fields)
        for key in loss.keys() - set(Loss.model_fields):
            if loss.get("preset", preset) is None:
                yield f"`{place}.{key}` is unknown; {suggest(str(key), known)}"
            elif isinstance(loss[key], float) and not math.isfinite(loss[key]):
                yield f"`{place}.{key}`: found {loss[key]!r}; a preset's numbers are finite"
