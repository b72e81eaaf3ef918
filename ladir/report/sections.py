"""The parts of a report's page."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.figure import Figure

from ladir.report.tables import Grid


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its file and what it shows, for those who cannot see it."""

    name: str
    figure: Figure
    description: str


@dataclass(frozen=True)
class Section:
    """A part of the page; ``missing`` (text, command) stands where there is neither picture nor table."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    missing: tuple[str, str] | None = None
    tables: list[Grid] = field(default_factory=list)
