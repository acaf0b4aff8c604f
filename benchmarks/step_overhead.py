"""CPU time of a training step, beside eager and one that computes nothing, with autograd's threads and without.

Without a GPU: of a forward whose operations take nearly nothing, by the module's Python and by `fxfuse/straight.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxfuse
from fxfuse import aside
from fxfuse.bench.rivals import AutogradAlone
from fxfuse.bench.workloads import LinearReLUDivide, LinearScaleBatchNorm
from fxfuse.plan import plan_of


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


def without_a_gpu(rounds: int = 300, count: int = 200) -> None:
    """The least of the rounds, which are taken in turn."""
    torch.set_num_threads(1)
    aside._capturing = lambda: False  # a torch without CUDA cannot say
    table = []
    for kind in (LinearReLUDivide, LinearScaleBatchNorm):
        model, x = kind(16, 16), torch.randn(4, 16, requires_grad=True)
        fused, times = fxfuse.optimize(model), {"eager": float("inf"), "fxfuse": float("inf")}
        plan = plan_of(fused)
        assert plan is not None and count < aside.EVERY
        (variants,) = plan.variants.values()
        for _ in range(rounds):
            assert variants[0].straight is not None
            plan.aside.learn((x.shape, x.dtype, False), variants[0].straight.function(fused), variants[0].holds)
            for name, callee in (("eager", model), ("fxfuse", fused)):
                start = time.perf_counter()
                for _ in range(count):
                    callee(x)
                times[name] = min(times[name], 1e6 * (time.perf_counter() - start) / count)
        table.append([kind.__name__, *[f"{us:.1f}" for us in times.values()]])
    print(tabulate(table, ["a forward of 4x16x16, us", "eager", "fxfuse, aside"]))


def main() -> None:
    if not torch.cuda.is_available():
        without_a_gpu()
        return
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
