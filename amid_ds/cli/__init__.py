"""The commands."""

from amid_ds.cli.main import main, run

__all__ = ["main", "run"]
