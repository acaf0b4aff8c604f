"""explain(): why each replacement was made, what it saves, what was left alone."""

from __future__ import annotations

from typing import Any

from fxfuse.api import report as report_of

__all__ = ["explain"]


def explain(fused: Any) -> str:
    """The story of an optimized module or function, for a person."""
    return str(report_of(fused))
