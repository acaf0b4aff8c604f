"""Counters in a GPU's memory by which the blocks of a launch know of each other."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counters_of"]

_zeros: dict[tuple[int | None, int], Tensor] = {}  # by device and stream


def counters_of(device: torch.device, queue: int, count: int) -> Tensor:
    """int32 zeros that a launch leaves as zeros: one tensor for each stream, whose launches follow each other. A graph
    under capture has its own, since it may be replayed on any stream."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, queue)
    kept = _zeros.get(key)
    if kept is None or kept.numel() < count:
        kept = _zeros[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept
