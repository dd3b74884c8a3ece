"""Tables on the terminal: a name of a run, a file or a model is text in them, never markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from amid_ds.errors import printable


class PlainConsole(Console):
    """rich's console, for which brackets are no markup, colons no emoji, and ESC is a character."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every text of a table goes through here."""
        return super().render_str(printable(text), **{**settings, "markup": False, "emoji": False})
