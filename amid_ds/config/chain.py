"""The file of `amid-ds chain`: recipes of which each one's student is the next one's teacher.

    base: distil.yaml                 # what the links share; its teacher is the first link's
    output_dir: runs/assistants       # a run for each link, in the folder of its name
    chain:
      - {name: medium, overrides: [student.model=models/medium]}
      - {name: small, overrides: [student.model=models/small, train.steps=2000]}
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from amid_ds.config.parse import error_lines, named_value
from amid_ds.config.section import PathText, Section
from amid_ds.config.strict import load_yaml, read_user_file
from amid_ds.errors import InputError

# A folder's name that no shell takes for something else.
LINK_NAME = re.compile(r"\w[\w.=+-]*", re.ASCII)
# The keys by which a recipe says who teaches.
NAMES_OF_A_TEACHER = ("teacher.cached", "teacher.ema", "teacher.model")


class ChainLink(Section):
    """One run of a chain."""

    name: str
    """Of its folder."""
    recipe: PathText | None = None
    """Its recipe; None: the chain's `base`."""
    overrides: list[str] = Field(default=[])
    """Of the recipe's keys, in the form a.b=c."""

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, name: str) -> str:
        if not LINK_NAME.fullmatch(name):
            raise ValueError("the name of a folder: letters, digits and . _ = + -")
        return name

    @field_validator("overrides")
    @classmethod
    def _keep_the_folder(cls, overrides: list[str]) -> list[str]:
        if own := [each for each in overrides if each.partition("=")[0].strip() == "output_dir"]:
            raise ValueError(f"`{own[0]}`: the chain gives each link its folder; leave it out")
        return overrides


class ChainFile(Section):
    """The links, from the first teacher's student to the last."""

    base: PathText | None = None
    """The recipe of links without one of their own."""
    output_dir: PathText
    """The folder of all runs and of the report."""
    chain: list[ChainLink] = Field(min_length=2)

    @model_validator(mode="after")
    def _links_differ(self) -> ChainFile:
        names = [link.name for link in self.chain]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two links are called {twice[0]}, and would share a folder; rename "
                             "one")
        if self.base is None and (bare := [link.name for link in self.chain
                                           if link.recipe is None]):
            raise ValueError(f"the link {bare[0]} has no `recipe`, and the chain no `base`; name "
                             "one of them")
        return self

    def recipe_of(self, link: ChainLink) -> str:
        """The path of its recipe."""
        path = link.recipe or self.base
        assert path is not None
        return path

    def named_teacher(self, link: ChainLink, overrides: list[str]) -> tuple[str, str] | None:
        """Key and value of what a link itself names as its teacher: by these overrides, or in a
        recipe of its own.

        The base's names the first teacher, and is no link's. None: nobody. Raises InputError.
        """
        said = [each for each in overrides
                if each.partition("=")[0] in ("teacher", *NAMES_OF_A_TEACHER)]
        if link.recipe is None and not said:
            return None
        values = {key: named_value(self.recipe_of(link), overrides, key)
                  for key in NAMES_OF_A_TEACHER}
        return next(((key, str(value)) for key, value in values.items() if value is not None),
                    None)


def read_chain(path: str) -> ChainFile:
    """The chain in a YAML file. Raises one InputError with all its problems."""
    try:
        return ChainFile.model_validate(load_yaml(read_user_file(Path(path))))
    except ValidationError as error:
        problems = error_lines(error, ChainFile, "chain")
    except (OSError, ValueError) as error:
        problems = [f"it cannot be read: {error}"]
    raise InputError("\n    - ".join([f"the chain {path}:", *problems]),
                     "base, output_dir and chain, as in amid_ds/experiments/README.md",
                     "fix the lines above")
