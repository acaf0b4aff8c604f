"""Small products: the host's time a call through fxfuse.optimize, beside eager, and the GPU's time of the kernel,
beside the library's product and a pass behind it (in CUDA graphs, where the host does not count)."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxfuse

SHAPES = [(1, 64, 64), (16, 256, 256), (64, 512, 512), (256, 1024, 1024), (256, 2048, 2048)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class ScaledNorm(nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(k, n), nn.BatchNorm1d(n)
        self.scale = nn.Parameter(torch.rand(n) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.linear(x) * self.scale)


class ReluHalf(nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.linear(x)) / 2


def host(calls: list[Callable[[], Any]], count: int, rounds: int) -> list[float]:
    """Microseconds a call of each: the median of rounds of `count` calls, in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(20):
            call()
    for _ in range(rounds):
        for call, kept in zip(calls, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            torch.cuda.synchronize()
            kept.append((time.perf_counter() - start) / count * 1e6)
    return [statistics.median(t) for t in times]


def device(calls: list[Callable[[], Any]], rounds: int = 7, inner: int = 20) -> list[float]:
    """GPU microseconds a call of each, in a CUDA graph of `inner` calls."""
    graphs = []
    for call in calls:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(inner):
                call()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for graph, kept in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
            kept.append(start.elapsed_time(end) * 1e3 / (5 * inner))
    return [statistics.median(t) for t in times]


def hosts(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        for m, n, k in SHAPES:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            for work, model, training in (
                ("scale-bn eval", ScaledNorm(n, k), False),
                ("scale-bn train", ScaledNorm(n, k), True),
                ("relu/2", ReluHalf(n, k), False),
            ):
                if training and m == 1:
                    continue
                eager = model.to("cuda", dtype).train(training)
                fused = fxfuse.optimize(copy.deepcopy(eager))
                for gradients in (False, True):
                    with torch.set_grad_enabled(gradients):
                        e, f = host([lambda: eager(x), lambda: fused(x)], args.count, args.rounds)  # noqa: B023
                    rows.append({"clock": "host", "work": work, "dtype": name, "shape": [m, n, k],
                                 "gradients": gradients, "eager": e, "fused": f})  # fmt: skip
                    print(f"host {work:15} {name} {m}x{n}x{k} {'grad' if gradients else 'no_grad':8}"
                          f" eager {e:6.1f} fused {f:6.1f} {f / e:5.2f}", flush=True)  # fmt: skip
    return rows


GPU_SHAPES = [
    (m, n, k)
    for n, k in ((64, 64), (256, 256), (512, 512), (1024, 1024), (512, 2048), (2048, 512), (2048, 2048), (4096, 4096))
    for m in (1, 16, 32, 64, 128, 256)
]


def devices(args: argparse.Namespace) -> list[dict[str, Any]]:
    from fxfuse.kernels import linear_activation_scale as las
    from fxfuse.kernels import linear_scale_batchnorm1d as lsb
    from fxfuse.kernels import small_gemm

    rows = []
    act = las.Act("relu", 0.0, 0.0, 1.0, 0.5)
    for name, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        for m, n, k in GPU_SHAPES:
            if name == "fp16":
                continue
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            w = torch.randn(n, k, device="cuda", dtype=dtype)
            b = torch.randn(n, device="cuda", dtype=dtype)
            s, mean, var = torch.randn(3, n, device="cuda", dtype=dtype).abs().unbind()
            c = lsb.Columns(b, s, None, 1.0, s, b, 1e-5)
            launch = small_gemm.activation(x, w, b, act)
            evaluation = small_gemm.batchnorm(x, w, c, mean, var, dtype, False)
            calls: list[Callable[[], Any]] = [
                lambda: launch(x),  # noqa: B023
                lambda: (z := F.linear(x, w, b), las.apply(z, act, z)),  # noqa: B023
                lambda: evaluation(x),  # noqa: B023
                lambda: (z := F.linear(x, w), lsb.eval_apply(z, c, mean, var, z)),  # noqa: B023
            ]
            if m > 1:
                training = small_gemm.batchnorm(x, w, c, mean, var, dtype, True, 0.1)
                calls += [
                    lambda: training(x),  # noqa: B023
                    lambda: (z := F.linear(x, w), lsb.train_apply(z, None, c, mean, var, 0.1, z)),  # noqa: B023
                ]
            times = device(calls)
            rows.append({"clock": "gpu", "dtype": name, "shape": [m, n, k], "times": times})
            pairs = " ".join(f"{a:6.2f}/{b:6.2f}={a / b:4.2f}" for a, b in zip(times[::2], times[1::2], strict=True))
            print(f"gpu {name} {m}x{n}x{k} act, eval, train: {pairs}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default="host,gpu")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    print(torch.__version__, torch.cuda.get_device_name(), sys.version.split()[0])
    rows = (hosts(args) if "host" in args.what else []) + (devices(args) if "gpu" in args.what else [])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
