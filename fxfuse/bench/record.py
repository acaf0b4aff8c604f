"""Tables that a script measured, as a JSON with the machine in it; `bench.tables` puts them into the docs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxfuse.bench import machine
from fxfuse.bench.run import save

Table = dict[str, Any]


def table(headings: Sequence[str], lines: Sequence[Sequence[object]], left: int = 1) -> Table:
    """One table; what stands in it is text already, and aligned as text in the first `left` columns."""
    return {"headings": list(headings), "lines": [[str(cell) for cell in line] for line in lines], "left": left}


def write(path: Path, command: str, tables: dict[str, Table], device: torch.device) -> None:
    """Write `tables` by name to `path`, whole or not at all."""
    document = {
        "schema": 1,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": device.type,
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "results": [],
        "tables": tables,
    }
    save(document, path)
