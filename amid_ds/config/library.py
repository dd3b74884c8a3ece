"""The recipes in the package: published trainings, each with its paper and table, to be copied.

A recipe is a file to read and change, not a preset to call by name: `amid-ds recipes copy` puts it
where the user works, and from then on it is theirs.
"""

from __future__ import annotations

import os
from pathlib import Path

from amid_ds.errors import InputError, suggest

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def packaged_folder(name: str) -> Path:
    """The folder `ds_configs` or `slurm`: in the package in a wheel, next to it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def _packaged_files() -> list[Path]:
    """Recipes, then files of `amid-ds chain`."""
    return [path for folder in (RECIPES_FOLDER, RECIPES_FOLDER / "chains")
            for path in sorted(folder.glob("*.yaml"))]


def find_recipe(name: str) -> Path:
    """The file of a packaged recipe or chain. Raises InputError if none has that name."""
    known = {path.stem: path for path in _packaged_files()}
    if name not in known:
        raise InputError(f"no recipe {name!r} comes with the package",
                         f"one of {', '.join(known)}", suggest(name, list(known)))
    return known[name]


def packaged_recipes() -> dict[str, str]:
    """The first sentence of the comment at the top of each packaged file, by its name."""
    described = {}
    for path in _packaged_files():
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# "))
        described[path.stem] = " ".join(comment).partition(". ")[0].rstrip(".")
    return described


def list_recipes() -> None:
    """Print each packaged file's name and what it is."""
    for name, words in packaged_recipes().items():
        print(f"{name:<20} {words}")


def copy_recipe(name: str, out: str | None) -> None:
    """Copy a packaged recipe to `out`, a file or folder, by default NAME.yaml; print its path.

    Raises InputError rather than overwrite a file.
    """
    source = find_recipe(name)
    target = new_file_at(Path(out or source.name), source.name)
    write_new_file(target, source.read_text(encoding="utf-8"))
    print(target)


def new_file_at(path: Path, name: str) -> Path:
    """The path of a recipe that is to be written: `path`, or of that name in a folder `path`.

    Raises InputError where it cannot be written.
    """
    target = path / name if path.is_dir() else path
    if os.path.lexists(target) or not os.access(target.parent, os.W_OK):
        raise _not_writable(target, "it is there" if os.path.lexists(target) else
                            f"{target.parent} is no folder that can be written to")
    return target


def write_new_file(target: Path, text: str) -> None:
    """Write a file that is not there yet, whole. Raises InputError."""
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _not_writable(target, str(error.strerror)) from None


def _not_writable(target: Path, problem: str) -> InputError:
    return InputError(f"the recipe cannot be written to {target}: {problem}",
                      "a file that is not there yet, in a folder that is", "name another path")
