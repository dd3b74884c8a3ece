"""The commands."""

from amid_ds.cli.main import main

__all__ = ["main"]
