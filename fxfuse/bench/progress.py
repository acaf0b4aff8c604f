"""The progress bar of the bench: tqdm where it is installed, plain lines on stderr where it is not."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Counts finished cases and says what is being done; a context manager."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        try:
            from tqdm import tqdm

            self._bar: Any = tqdm(total=total, unit="case", file=sys.stderr, dynamic_ncols=True)
        except ImportError:
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str("")
            self._bar.close()

    def tell(self, what: str) -> None:
        """Show what is being done now."""
        if self._bar is not None:
            self._bar.set_postfix_str(what)
        else:
            print(f"fxfuse bench [{self.done}/{self.total}] {what}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """One more case is finished."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(1)
