"""Texts of models and users on their way into pictures and pages: they may hold anything."""

from __future__ import annotations

import html


def one_line(text: str, most: int) -> str:
    """The text in one line of at most ``most`` printable characters."""
    line = printable(" ⏎ ".join(" ".join(part.split()) for part in text.splitlines() if part.strip()))
    return line if len(line) <= most else line[: most - 1] + "…"


def escaped(text: object) -> str:
    """The text for HTML, in an element or an attribute."""
    return html.escape(printable(str(text)), quote=True)


def printable(text: str) -> str:
    """The text without control characters, lone surrogates and marks that turn the direction of writing."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
