"""The recipes in the package: published trainings, each with its paper and table, to be copied.

A recipe is a file to read and change, not a preset to call by name: `amid-ds recipes copy` puts it
where the user works, and from then on it is theirs.
"""

from __future__ import annotations

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


def list_recipes() -> None:
    """Print each packaged file's name and the first sentence of the comment at its top."""
    for path in _packaged_files():
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# "))
        print(f"{path.stem:<20} {' '.join(comment).partition('. ')[0].rstrip('.')}")


def copy_recipe(name: str, out: str | None) -> None:
    """Copy a packaged recipe to `out`, a file or folder, by default NAME.yaml; print its path.

    Raises InputError rather than overwrite a file.
    """
    source, target = find_recipe(name), Path(out or f"{name}.yaml")
    if target.is_dir():
        target /= source.name
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe cannot be written to {target}: {error.strerror}",
                         "a file that is not there yet",
                         f"amid-ds recipes copy {name} PATH, with another path") from None
    print(target)
