"""CPU time of a training step, beside eager and one that computes nothing, with autograd's threads and without."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxfuse
from fxfuse.bench.rivals import AutogradAlone
from fxfuse.bench.workloads import LinearScaleBatchNorm


class Collapse(nn.Module):
    """x[M, K] -> Linear(x), summed over its N columns and halved."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(-1) * 0.5


def step_us(callee: Callable[[Tensor], Tensor], leaves: list[Tensor], dy: Tensor, count: int = 200) -> float:
    """The least of five runs, in microseconds a step; the device is waited for at the end of each."""
    best = float("inf")
    for _ in range(6):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            torch.autograd.grad(callee(leaves[0]), leaves, dy)
        torch.cuda.synchronize()
        best = min(best, 1e6 * (time.perf_counter() - start) / count)
    return best


def main() -> None:
    table = []
    for kind in (Collapse, LinearScaleBatchNorm):
        for m, n, k in [(64, 256, 256), (1024, 8192, 8192)]:
            model = kind(k, n).to("cuda", torch.bfloat16)
            callees = {"eager": model, "fxfuse": fxfuse.optimize(model), "autograd alone": AutogradAlone(model)}
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            leaves, dy = [x, *model.parameters()], torch.randn_like(model(x))
            for threads in (True, False):
                with torch.autograd.set_multithreading_enabled(threads):
                    times = [f"{step_us(callee, leaves, dy):.0f}" for callee in callees.values()]
                where = "autograd's thread" if threads else "the calling thread"
                table.append([kind.__name__, f"{m}x{n}x{k}", where, *times])
    print(tabulate(table, ["a step, us", "size", "backward in", *callees]))


if __name__ == "__main__":
    main()
