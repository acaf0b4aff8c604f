"""How often a test draws its data. Errors are judged over many draws, so that the luck of one does not decide. A tool
of compute-sanitizer looks at what a launch touches, and another draw of the same sizes touches the same: under a tool
there are two, and how large errors are is left to the suite without it."""

from __future__ import annotations

under_a_tool = False  # pytest's --under-a-tool


def times(wanted: int) -> int:
    return min(wanted, 2) if under_a_tool else wanted
