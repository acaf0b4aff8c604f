"""A graph before and after, as plain data: what optimizing writes down and ``draw.py`` makes a picture of."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Drawing"]


@dataclass(frozen=True)
class Drawing:
    """A graph before and after, as (node name, label, names of the nodes it reads, pattern or '').

    ``layers`` gives the class of every module that is called, by path.
    """

    where: str
    before: tuple[tuple[str, str, tuple[str, ...], str], ...]
    after: tuple[tuple[str, str, tuple[str, ...], str], ...]
    layers: dict[str, str] = field(default_factory=dict)
