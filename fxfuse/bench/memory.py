"""Peak memory of one call, above what is held before it (inputs, weights): outputs, gradients and all temporaries.

CUDA: the caching allocator's own high-water mark; for CUDA graphs, whose memory stays in private pools between
calls, the size of the pools they added where that is more.
CPU: every allocation and release of tensor memory as PyTorch's CPU allocator reports it to the profiler, summed up in
order; exact to the byte and repeatable, where a process's RSS is neither. Scratch that a BLAS library takes from the
system by itself is not in it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

_MEMORY_EVENT = "[memory]"


def peak_bytes(call: Callable[[], object], device: torch.device, graph_pool_before: int = 0) -> int:
    """Bytes that `call` holds at its peak beyond those held when it begins.

    Args:
        call: runs the computation once; what it returns is dropped. Warm it up first.
        device: where the computation runs.
        graph_pool_before: `graph_pool_bytes(device)` from before the computation was first run.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return max(peak, graph_pool_bytes(device) - graph_pool_before)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else writes two lines to stderr every time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return _high_water(profile)


def _high_water(profile: torch.profiler.profile) -> int:
    assert profile.profiler is not None
    kineto = profile.profiler.kineto_results
    assert kineto is not None
    events: list[Any] = kineto.events()  # the stubs leave nbytes() out
    records = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == _MEMORY_EVENT and event.device_type() == torch._C._autograd.DeviceType.CPU
    ]
    held = peak = 0
    for _, change in sorted(records, key=lambda record: record[0]):
        held += change
        peak = max(peak, held)
    return peak


def graph_pool_bytes(device: torch.device) -> int:
    """Bytes in the private pools of CUDA graphs on `device`; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(
        segment["total_size"]
        for segment in segments
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) and segment["device"] == (device.index or 0)
    )
