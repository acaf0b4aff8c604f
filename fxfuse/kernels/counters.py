"""Counters in a GPU's memory by which the blocks of a launch know of each other."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from fxfuse.kernels.abi import PTR
from fxfuse.kernels.loader import library

__all__ = ["counters_of"]

_LEAST = 1024  # int32 of a stream
_SPARE = 1 << 16  # int32 set aside on a device for captures to come

_zeros: dict[tuple[int | None, int], Tensor] = {}  # by device and stream
_captured: dict[tuple[int | None, int], tuple[int, Tensor]] = {}  # the same, of the last capture by its number
_spare: dict[int | None, Tensor] = {}  # by device: what no capture has yet
_ours: list[Tensor] = []  # all that was set aside: graphs may be replayed as long as the process lives
_lock = threading.Lock()


def counters_of(device: torch.device, queue: int, count: int) -> Tensor:
    """int32 zeros that a launch leaves as zeros: one tensor for each stream, whose launches follow each other.

    A capture has its own, for each of its streams, since a graph may be replayed beside anything. They come from memory
    zeroed before it; where none is left, from zeros inside the graph, which are one launch more in each replay.
    """
    key = device.index, queue
    if torch.cuda.is_current_stream_capturing():
        return _in_graph(device, key, count)
    kept = _zeros.get(key)
    if kept is None or kept.numel() < count:
        kept = _zeros[key] = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=device)
        _set_aside(device)
    return kept


def _set_aside(device: torch.device) -> None:
    with _lock:
        if device.index in _spare:
            return
        _spare[device.index] = torch.zeros(_SPARE, dtype=torch.int32, device=device)
        _ours.append(_spare[device.index])
        torch.cuda.current_stream(device).synchronize()  # a graph may be replayed on any stream


def _in_graph(device: torch.device, key: tuple[int | None, int], count: int) -> Tensor:
    capture = _capture_of(key[1])
    with _lock:
        last, kept = _captured.get(key, (0, None))
        if kept is not None and last == capture and kept.numel() >= count:
            return kept
        spare = _spare.get(device.index)
        if spare is None:
            return torch.zeros(count, dtype=torch.int32, device=device)
        if spare.numel() < count:
            del _spare[device.index]
            _zeros.clear()  # the next call outside of a capture sets new ones aside
            return torch.zeros(count, dtype=torch.int32, device=device)
        kept, _spare[device.index] = spare[:count], spare[count:]
        _captured[key] = capture, kept
        return kept


def _capture_of(queue: int) -> int:
    """The number of the capture that a stream is in, another one for each."""
    found = ctypes.c_uint64()
    _capture()(queue, ctypes.addressof(found))
    return found.value


@functools.lru_cache(maxsize=1)
def _capture() -> Callable[..., None]:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    return found.function("fxfuse_capture", [PTR, PTR])
