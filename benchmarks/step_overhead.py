"""CPU time of a training step, beside eager, eager once more (what the clock can tell apart), and a step of autograd's
that computes nothing.

All in turn, in an order drawn anew in every round. With a GPU: what a round's steps took as eager took it in the same
round, with autograd's threads and without. Without one: a forward, and a step, whose operations take nearly nothing, as
they step aside on a GPU (`fxfuse/aside.py`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import statistics
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

GROUP_US = 4e3  # a round of one lasts about as long
SIZES = [
    (16, 64, 256), (64, 256, 256), (128, 1024, 1024), (255, 1001, 777), (512, 4096, 4096), (300, 16384, 64),
    (1000, 777, 2048), (3072, 3072, 512), (768, 8192, 4096), (1280, 4096, 8192), (65536, 128, 4096),
]  # fmt: skip

Call = Callable[[], object]


class Collapse(nn.Module):
    """x[M, K] -> Linear(x), summed over its N columns and halved."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(-1) * 0.5


def step_of(model: Callable[[Tensor], Tensor], leaves: list[Tensor], dy: Tensor) -> Call:
    """A forward and a backward."""
    return lambda: torch.autograd.grad(model(leaves[0]), leaves, dy)


def in_turn(calls: dict[str, Call], wait: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Microseconds of one call, of each in every round; the device is waited for at the end of a round."""

    def group(call: Call, count: int) -> float:
        call()
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return 1e6 * (time.perf_counter() - start) / count

    for call in calls.values():
        group(call, 5)
    count = max(3, min(100, int(GROUP_US / group(calls["eager"], 10))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(group(calls[name], count))
    return times


def row(times: dict[str, list[float]]) -> list[str]:
    """Eager's median, and how many times as fast as it the others are: the median over rounds and its standard error
    (of a normal distribution with these quartiles)."""
    cells = [f"{statistics.median(times['eager']):.1f}"]
    for name in list(times)[1:]:
        ratios = [e / t for e, t in zip(times["eager"], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:.3f} ± {1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5:.3f}")
    return cells


def on_a_gpu(rounds: int) -> None:
    table = []
    for kind in (Collapse, LinearReLUDivide, LinearScaleBatchNorm):
        for m, n, k in [(64, 256, 256), (1024, 8192, 8192)] if kind is Collapse else SIZES:
            model = kind(k, n).to("cuda", torch.bfloat16)
            models: dict[str, nn.Module] = {"eager": model, "again": copy.deepcopy(model)}
            models["fxfuse"] = fxfuse.optimize(copy.deepcopy(model))
            if kind is Collapse:
                models["alone"] = AutogradAlone(model)
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            dy = torch.randn_like(model(x))
            leaves = {name: [x, *(one if name != "alone" else model).parameters()] for name, one in models.items()}
            for threads in (True, False):
                with torch.autograd.set_multithreading_enabled(threads):
                    calls = {name: step_of(one, leaves[name], dy) for name, one in models.items()}
                    times = in_turn(calls, torch.cuda.synchronize, rounds)
                for _ in range(2):  # one of them may have asked anew
                    models["fxfuse"](x)
                where = "autograd's thread" if threads else "the calling thread"
                plan = plan_of(models["fxfuse"])
                road = "eager's" if plan is not None and plan.aside.find((x,)) is not None else "kernels"
                table.append([kind.__name__, f"{m}x{n}x{k}", road, where, *row(times)])
    print(tabulate(table, ["a step", "size", "by", "backward in", "eager, us", "eager again, x", "fxfuse", "autograd"]))


def without_a_gpu(rounds: int) -> None:
    torch.set_num_threads(1)
    aside._on_a_gpu, aside._capturing = lambda x: True, lambda: False
    table = []
    for kind in (LinearReLUDivide, LinearScaleBatchNorm):
        model, x = kind(16, 16), torch.randn(4, 16, requires_grad=True)
        models = {"eager": model, "again": copy.deepcopy(model), "fxfuse": fxfuse.optimize(copy.deepcopy(model))}
        dy = torch.randn_like(model(x))
        steps = {name: step_of(one, [x, *one.parameters()], dy) for name, one in models.items()}
        forwards: dict[str, Call] = {name: functools.partial(one, x) for name, one in models.items()}
        with torch.autograd.set_multithreading_enabled(False):
            for what, calls in (("a forward", forwards), ("a step", steps)):
                table.append([kind.__name__, what, *row(in_turn(calls, lambda: None, rounds))])
    print(tabulate(table, ["4x16x16", "", "eager, us", "eager again, x", "fxfuse, aside"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    (on_a_gpu if torch.cuda.is_available() else without_a_gpu)(rounds)


if __name__ == "__main__":
    main()
