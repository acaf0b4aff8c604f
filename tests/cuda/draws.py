"""How often a test draws its data. Errors are judged over many draws, so that the luck of one does not decide. A tool
of compute-sanitizer looks at what a launch touches, and another draw of the same sizes touches the same: under a tool
there are two, and how large errors are is left to the suite without it."""

from __future__ import annotations

import os

#: As tests/sanitize.py runs the tests.
UNDER_A_TOOL = os.environ.get("FXFUSE_FOLLOWED", "") not in ("", "0")


def times(wanted: int) -> int:
    return min(wanted, 2) if UNDER_A_TOOL else wanted
