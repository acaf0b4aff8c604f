"""Times of several callables taken side by side, so that drift of the machine falls on all of them alike.

CUDA: events around a group of calls in the middle of a loop, as in training: one call goes before the clock starts, so
that the host is as far ahead of the GPU as it gets, and host time counts only where the GPU has to wait for it.
CPU: `time.perf_counter`. Each round times every callable once, in an order drawn anew: a GPU at the limit of its power
is slower after one that drew much than after one that drew little, so nobody must always follow the same one.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

GROUP_MS = {"cuda": 10.0, "cpu": 5.0}  # a timed group of calls lasts at least about this long
MAX_GROUP = 200

Step = Callable[[int], None]  # called with the running number of the call, which picks the input set


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median of the rounds, first and ninth decile; and how much was measured."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    calls_per_round: int

    @classmethod
    def of(cls, samples_ms: Sequence[float], group: int) -> Timing:
        """The summary of `samples_ms`, one per round, each the mean of `group` calls."""
        ordered = sorted(samples_ms)
        last = len(ordered) - 1
        return cls(
            median_ms=statistics.median(ordered),
            p10_ms=ordered[round(0.1 * last)],
            p90_ms=ordered[round(0.9 * last)],
            rounds=len(ordered),
            calls_per_round=group,
        )

    @property
    def spread(self) -> float:
        """(p90 - p10) / median: differences between rivals below this are noise."""
        return (self.p90_ms - self.p10_ms) / self.median_ms if self.median_ms else 0.0

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "spread": self.spread}


class _Clock:
    """Times groups of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls = 0

    def group_ms(self, step: Step, n: int) -> float:
        """Milliseconds that `n` calls of `step` take together."""
        first, self.calls = self.calls, self.calls + n
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if n > 1:  # a single call is long
                step(first + n)
            start.record()
            for i in range(n):
                step(first + i)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
        began = time.perf_counter()
        for i in range(n):
            step(first + i)
        return (time.perf_counter() - began) * 1e3


def time_together(
    steps: dict[str, Step],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = float("inf"),
    warmup: int = 3,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every step of `steps` in `rounds` interleaved rounds; at least 3 rounds, fewer than `rounds` when
    `seconds` run out. Steps must be compiled already: `warmup` calls only warm caches and clocks."""
    deadline = time.perf_counter() + seconds
    clock = _Clock(device)
    group: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(max(0, warmup - 1)):
            clock.group_ms(step, 1)
            if time.perf_counter() > deadline:
                break
        once = clock.group_ms(step, 1)
        group[name] = max(1, min(MAX_GROUP, math.ceil(GROUP_MS[device.type] / max(once, 1e-3))))

    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for r in range(max(3, rounds)):
        if r >= 3 and time.perf_counter() > deadline:
            break
        for name in random.sample(names, len(names)):
            samples[name].append(clock.group_ms(steps[name], group[name]) / group[name])
        on_round()
    return {name: Timing.of(samples[name], group[name]) for name in steps}
