"""`python -m fxfuse`: the command without installing it."""

from __future__ import annotations

import sys

from fxfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
