"""Checks and times the matmul-div-sum-scale kernels on the GPU at hand: ``python benchmarks/device_mm.py [--quick]``.

Builds the kernels, compares every output with float64 on fresh random data (outputs poisoned with NaN beforehand),
then times them beside ATen's two steps (``w.sum(0)``, ``x @ v``) and the bandwidth measured in the same run. Inputs
rotate so that the L2 does not serve them; the backward reads the x that the forward before it read, as in training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from fxfuse.bench import record
from fxfuse.kernels import loader
from fxfuse.kernels import matmul_div_sum_scale as mm

NAN = float("nan")


class Kernels:
    """The binding, its outputs and scratch poisoned on demand: the allocator hands out what is filled here."""

    @staticmethod
    def poison(*sizes: int) -> None:
        """Fills blocks that the next allocations of these many bytes will get with NaN, and gives them back."""
        for t in [torch.empty(max(1, size // 8), dtype=torch.float64, device="cuda").fill_(NAN) for size in sizes]:
            del t

    def forward(self, x, w, bias, scale, poison=False):  # type: ignore[no-untyped-def]
        """y and the sums of w and bias."""
        if poison:
            self.poison(x.shape[0] * x.element_size(), 4 * mm.sums_size(x.shape[1]), 1 << 20)
        return mm.forward(x, w, bias, scale)

    def backward(self, g, x, n, sums, scale, wanted=(True, True, True), poison=False):  # type: ignore[no-untyped-def]
        """dx, dw, db: None where not wanted."""
        if poison:
            size = x.element_size()
            self.poison(x.numel() * size, n * x.shape[1] * size, n * size, 1 << 20)
        return mm.backward(g, x, sums, n, scale, wanted)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((out.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def strided(rows: int, cols: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Random [rows, cols]: contiguous, "offset" (one element off 16-byte alignment) or "sliced" (of wider rows)."""
    if layout == "offset":
        return torch.randn(rows * cols + 1, device="cuda").to(dtype)[1:].view(rows, cols)
    if layout == "sliced":
        return torch.randn(rows, cols + 24, device="cuda").to(dtype)[:, 8 : 8 + cols]
    return torch.randn(rows, cols, device="cuda").to(dtype)


SHAPES = [  # m, n, k
    (1, 17, 17), (3, 1, 5), (1024, 8192, 8192), (1, 8192, 8192), (77, 300, 1000), (1000, 77, 1001), (65536, 64, 17),
    (33, 32768, 17), (129, 17, 32768), (64, 1000, 20000), (5, 3, 12289), (4096, 256, 64), (257, 511, 130),
    (2048, 30, 24), (512, 2048, 1024), (7, 5, 1), (300, 4099, 4100), (66, 130, 40000), (2, 100000, 3),
]  # fmt: skip


def check(kernels: Kernels) -> int:
    """The number of failures; prints each."""
    failures = 0
    # Half a unit in the last place, and a little for the arithmetic before it.
    limits = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for dtype, limit in limits.items():
        for m, n, k in SHAPES:
            for layout in ("whole", "offset", "sliced"):
                torch.manual_seed(m + n + k)
                x, w = strided(m, k, dtype, layout), strided(n, k, dtype, layout)
                bias = torch.randn(n, device="cuda").to(dtype) if n % 2 else None
                g = torch.randn(2 * m, device="cuda").to(dtype)[::2]
                scale, found = 0.37, {}
                y, sums = kernels.forward(x, w, bias, scale, poison=True)
                v = sums[:k]
                again = kernels.forward(x, w, bias, scale)[0]
                frozen = mm.frozen(x, sums, bias is not None, scale)
                alone = mm.column_sums(w, bias)
                dx, dw, db = kernels.backward(g, x, n, sums, scale, poison=True)
                alone_of = [tuple(i == j for j in range(3)) for i in range(3)]
                only = [kernels.backward(g, x, n, sums, scale, w_, True)[i] for i, w_ in enumerate(alone_of)]
                v64, g64 = w.double().sum(0), g.double()
                b64 = 0 if bias is None else bias.double().sum()
                found["v"] = error(v, v64) / (1e-7 / limit * 10)
                # y may cancel: its error is judged against the size of its terms.
                terms = scale * (x.double().abs() @ v64.abs() + abs(b64))
                found["y"] = float(((y.double() - scale * (x.double() @ v64 + b64)).abs() / terms).max())
                found["dx"] = error(dx, scale * g64[:, None] * v64)
                r64 = scale * (g64 @ x.double())
                size = scale * (g64.abs() @ x.double().abs())
                smallest = float(torch.tensor(1, dtype=torch.int16).view(torch.float16))  # float16 goes subnormal
                found["dw"] = float((((dw.double() - r64).abs() - smallest) / size).max())
                found["db"] = float((db.double() - scale * g64.sum()).abs().max() / (scale * g64.abs().sum()))
                bits = [torch.equal(y, again), torch.equal(y, frozen), torch.equal(v, alone[:k])]
                bits += [torch.equal(a, b) for a, b in zip((dx, dw, db), only, strict=True)]
                bad = {name: value for name, value in found.items() if not value <= limit}
                if bad or not all(bits):
                    failures += 1
                    print(f"WRONG {dtype} {m, n, k} {layout}: {bad} same bits {bits}")
                del x, w, dx, dw, only, v64, g64, terms, size
    return failures


def eager(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
    return (x @ w.T / 2).sum(-1) * scale


def accuracy(kernels: Kernels) -> list[list[object]]:
    """Errors against float64 beside eager's, for data that cancels and data that does not."""
    rows: list[list[object]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("random", "positive", "cancelling columns", "mirrored rows"):
            for m, n, k in ((256, 2048, 2048), (1024, 8192, 8192)):
                torch.manual_seed(7)
                draw = torch.rand if kind == "positive" else torch.randn
                x, w = (draw(s, device="cuda") / 8 for s in ((m, k), (n, k)))
                if kind == "cancelling columns":
                    w -= w.mean(0)
                if kind == "mirrored rows":
                    w[n // 2 :] = -w[: n // 2].flip(0) + 1e-3 * torch.randn(n // 2, k, device="cuda")
                    w = w[torch.randperm(n, device="cuda")]
                x, w = x.to(dtype), w.to(dtype)
                g = torch.randn(m, device="cuda").to(dtype)
                exact = 0.75 * (x.double() @ w.double().sum(0))
                xe, we = x.clone().requires_grad_(), w.clone().requires_grad_()
                ye = eager(xe, we, 1.5)
                ye.backward(g)
                y, v = kernels.forward(x, w, None, 0.75)
                dx, dw, _ = kernels.backward(g, x, n, v, 0.75)
                dx64 = 0.75 * g.double()[:, None] * w.double().sum(0)
                dw64 = (0.75 * (g.double() @ x.double())).expand(n, k)
                pairs = [(y, ye, exact), (dx, xe.grad, dx64), (dw, we.grad, dw64)]
                errors = [(error(a, c), error(b.detach(), c)) for a, b, c in pairs]
                verdict = "ok" if all(a <= 1.25 * b for a, b in errors) else "WORSE"
                rows.append([str(dtype)[6:], kind, f"{m}x{k}x{n}", *[f"{a:.1e}/{b:.1e}" for a, b in errors], verdict])
    return rows


def time_us(step: Callable[[int], object], group: int = 16, rounds: int = 15) -> float:
    """Microseconds of a call: median over rounds of groups of calls between two events."""
    for i in range(4):
        step(i)
    samples = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(group):
            step(i)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / group)
    return statistics.median(samples)


def graph_us(step: Callable[[int], object], calls: int = 12, rounds: int = 15) -> float:
    """The same from a captured CUDA graph of `calls` calls: no host time at all."""
    for i in range(3):
        step(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            step(i)
    return time_us(lambda _: graph.replay(), group=2, rounds=rounds) / calls


@dataclass
class Case:
    """Rotating inputs of one shape."""

    m: int
    n: int
    k: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        size = self.dtype.itemsize
        sets = [max(2, min(32, int(3e8 // max(1, r * self.k * size)))) for r in (self.m, self.n)]
        self.xs = [torch.randn(self.m, self.k, device="cuda", dtype=self.dtype) for _ in range(sets[0])]
        self.ws = [torch.randn(self.n, self.k, device="cuda", dtype=self.dtype) for _ in range(sets[1])]
        self.g = torch.randn(self.m, device="cuda", dtype=self.dtype)

    def x(self, i: int) -> torch.Tensor:
        return self.xs[i % len(self.xs)]

    def w(self, i: int) -> torch.Tensor:
        return self.ws[i % len(self.ws)]


def composed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w.sum(0, dtype=torch.float32).to(x.dtype)).mul_(0.75)


def bandwidth() -> list[list[object]]:
    big = [torch.randn(1 << 28, device="cuda") for _ in range(2)]
    size = big[0].numel() * 4
    times = {
        "copy": (time_us(lambda i: big[i % 2].copy_(big[1 - i % 2]), 4), 2 * size),
        "fill": (time_us(lambda i: big[i % 2].fill_(1.5), 4), size),
        "read (sum)": (time_us(lambda i: big[i % 2].sum(), 4), size),
    }
    return [[name, f"{us:.1f}", f"{bytes_ / us * 1e-6:.2f}"] for name, (us, bytes_) in times.items()]


BARS = {
    (torch.float32, "forward"): 80, (torch.float32, "forward+backward"): 170, (torch.float32, "frozen"): 14,
    (torch.bfloat16, "forward"): 42, (torch.bfloat16, "forward+backward"): 90,
}  # fmt: skip


def headline(kernels: Kernels, dtype: torch.dtype) -> list[list[object]]:
    case = Case(1024, 8192, 8192, dtype)
    v = mm.column_sums(case.w(0), None)

    def forward(i: int) -> torch.Tensor:
        return kernels.forward(case.x(i), case.w(i), None, 0.75)[1]

    def backward(i: int, v: torch.Tensor = v, dx: bool = True, dw: bool = True) -> None:
        kernels.backward(case.g, case.x(i), case.n, v, 0.75, (dx, dw, False))

    steps: dict[str, Callable[[int], object]] = {
        "forward": forward,
        "forward+backward": lambda i: backward(i, forward(i)),
        "frozen": lambda i: mm.frozen(case.x(i), v, False, 0.75),
        "v only": lambda i: mm.column_sums(case.w(i), None),
        "backward": backward,
        "dx only": lambda i: backward(i, dw=False),
        "dw only": lambda i: backward(i, dx=False),
        "ATen w.sum(0)": lambda i: case.w(i).sum(0),
        "ATen x @ v": lambda i: case.x(i) @ case.w(0)[0],
        "ATen two steps": lambda i: composed(case.x(i), case.w(i)),
    }
    rows: list[list[object]] = []
    for name, step in steps.items():
        bar = BARS.get((dtype, name), "")
        rows.append([str(dtype)[6:], name, f"{time_us(step):.1f}", f"{graph_us(step):.1f}", bar])
    return rows


SWEEP = [  # m, n, k
    (1, 8192, 8192), (1, 17, 17), (16, 1024, 1024), (65536, 64, 64), (65536, 17, 17), (4096, 4096, 4096),
    (64, 32768, 1024), (64, 1024, 32768), (1024, 8191, 8191), (1024, 4097, 1023), (65536, 512, 512), (128, 128, 32768),
    (128, 32768, 128), (16384, 1024, 8192), (1024, 10000, 10000), (256, 17, 8192), (256, 8192, 17), (65536, 100, 1000),
]  # fmt: skip


def sweep(kernels: Kernels, m: int, n: int, k: int, dtype: torch.dtype) -> list[object]:
    case = Case(m, n, k, dtype)
    v = mm.column_sums(case.w(0), None)
    ours = graph_us(lambda i: kernels.forward(case.x(i), case.w(i), None, 0.75), 8, 7)
    aten = graph_us(lambda i: composed(case.x(i), case.w(i)), 8, 7)
    back = graph_us(lambda i: kernels.backward(case.g, case.x(i), n, v, 0.75, (True, True, False)), 8, 7)
    row = k * dtype.itemsize
    limits = [f"{rows * row / 4.2e6:.1f}" for rows in (m + n, 2 * m + n)]
    verdict = "" if ours <= aten else "SLOWER"
    return [str(dtype)[6:], f"{m}x{k}x{n}", f"{ours:.1f}", f"{aten:.1f}", limits[0], verdict, f"{back:.1f}", limits[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no shape sweep")
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--json", type=Path, help="write the tables there")
    options = parser.parse_args()
    assert mm.available(), loader.why_unavailable()
    kernels = Kernels()
    print(torch.cuda.get_device_name(), torch.__version__, loader.library())
    print("failed checks:", check(kernels))
    if options.check:
        return
    tables = {"errors": record.table(["dtype", "data", "m x k x n", "y ours/eager", "dx", "dw", ""], accuracy(kernels))}
    tables["bandwidth"] = record.table(["bandwidth", "us", "TB/s"], bandwidth())
    rows = [row for dtype in (torch.float32, torch.bfloat16, torch.float16) for row in headline(kernels, dtype)]
    tables["kernels"] = record.table(["dtype", "1024x8192x8192", "us", "us in a graph", "bar"], rows)
    if not options.quick:
        head = ["dtype", "m x k x n", "forward us", "ATen two steps", "limit", "", "backward us", "limit "]
        rows = [sweep(kernels, *shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SWEEP]
        tables["shapes"] = record.table(head, rows)
    for held in tables.values():
        print(tabulate(held["lines"], held["headings"], disable_numparse=True))
    if options.json:
        record.write(options.json, "python benchmarks/device_mm.py --json benchmarks/device_mm.json", tables,
                     torch.device("cuda"))  # fmt: skip


if __name__ == "__main__":
    main()
