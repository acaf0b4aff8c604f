"""GPU time alone: the same calls captured in a CUDA graph and replayed, so that Python and launches cost nothing.

A call of a few hundred microseconds is bound by the host that issues it; in a model the host runs ahead and that time
is hidden. Both times are of interest and both are shown: what one call costs a user who waits for it, and what it costs
the GPU. Every rival is captured alike; one that cannot be captured has no GPU time, with the reason.
"""

from __future__ import annotations

import torch

from fxfuse.bench.timing import Step

GROUP_MS = 2.0  # of GPU work in one graph
MOST_CALLS = 20


def calls_in_graph(host_ms: float) -> int:
    """How many calls one graph holds: enough for a group that can be timed, few enough for its memory."""
    return max(1, min(MOST_CALLS, round(GROUP_MS / max(host_ms, 1e-3))))


def capture(step: Step, calls: int, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of `calls` runs of `step`, on its running numbers from 0 so that inputs rotate as they do outside.

    Raises what the step or the capture raises: a call that waits for the GPU cannot be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # a first run elsewhere than in the capture: libraries make their handles here
        for i in range(2):
            step(i)
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            step(i)
    return graph


def replaying(graph: torch.cuda.CUDAGraph) -> Step:
    """The graph as a step that can be timed."""

    def replay(i: int) -> None:
        graph.replay()

    return replay
