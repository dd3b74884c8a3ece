"""The recipes that come with the package: published trainings, each with its paper and table, ready to be copied.

A recipe is a file to be read and changed, not a preset to be called by name: `amid-ds recipes copy` puts it where the
user works, and from then on it is theirs.
"""

from __future__ import annotations

from pathlib import Path

from amid_ds.errors import InputError, suggest

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def packaged_folder(name: str) -> Path:
    """The folder `ds_configs` or `slurm`: in a wheel it lies inside the package, in a checkout beside it."""
    package = Path(__file__).parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def find_recipe(name: str) -> Path:
    """A packaged recipe's file. Raises InputError where there is none of that name."""
    path = RECIPES_FOLDER / f"{name}.yaml"
    known = sorted(found.stem for found in RECIPES_FOLDER.glob("*.yaml"))
    if path.stem not in known:
        raise InputError(f"no recipe {name!r} comes with the package", f"one of {', '.join(known)}",
                         suggest(name, known))
    return path


def list_recipes() -> None:
    """Each recipe's name and the first sentence of what is written at its top."""
    for path in sorted(RECIPES_FOLDER.glob("*.yaml")):
        words = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            words.append(line.lstrip("# "))
        print(f"{path.stem:<20} {' '.join(words).partition('. ')[0].rstrip('.')}")


def copy_recipe(name: str, out: str | None) -> None:
    """Copy a recipe to `out`, by default NAME.yaml here, and print where it is. Nothing is overwritten."""
    source, target = find_recipe(name), Path(out or f"{name}.yaml")
    if target.is_dir():
        target /= source.name
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe cannot be written to {target}: {error.strerror}", "a file that is not there yet",
                         f"amid-ds recipes copy {name} PATH, with another path") from None
    print(target)
