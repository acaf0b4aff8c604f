"""Blocks of rows that stay in the cores' own caches: many passes over a block cost one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1)
def _cache_bytes() -> int:
    """Second-level cache of one core in bytes; 1 MiB where the system does not say. At most 2 MiB is used."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        size = int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
    except (OSError, ValueError):
        size = 1 << 20
    return min(max(size, 1 << 18), 1 << 21)


def block_rows(rows: int, bytes_per_row: int) -> int:
    """The rows of a block such that what it touches (`bytes_per_row` a row) fits the caches of all threads."""
    budget = _cache_bytes() * torch.get_num_threads()
    return max(1, min(rows, budget // max(1, bytes_per_row)))


def blocks(rows: int, step: int) -> Iterator[slice]:
    """Slices of 0..rows, `step` rows each but for the last."""
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


class Workspace:
    """Scratch tensors of a block, allocated once and handed out again for every block."""

    def __init__(self, count: int, step: int, *width: int, dtype: torch.dtype) -> None:
        self._buffers = torch.empty(count, step, *width, dtype=dtype)

    def __call__(self, rows: int) -> tuple[Tensor, ...]:
        """The buffers, `rows` rows of each."""
        return self._buffers[:, :rows].unbind()


def widened(block: Tensor, buffer: Tensor) -> Tensor:
    """`block` in the buffer's dtype: itself, or copied into the buffer."""
    return block if block.dtype == buffer.dtype else buffer.copy_(block)
