"""Float32 products on the tensor cores: time against the library's in the same run, error against float64.

Run on an H100 or H200: ``python benchmarks/device_float32.py [--library FILE.so] [--sweep] [--out FILE.json]``.
Without --library it compiles ``float32_variants.cu`` with nvcc into a temporary folder. The tables go to --out as JSON.
``--plot FILE.json PICTURE.svg`` draws error by interval from it, anywhere.
"""

# Every lambda here runs before its loop goes on.
# ruff: noqa: B023
from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from fxfuse.bench import record

HERE = Path(__file__).resolve().parent
SHAPES = [(1024, 8192, 8192), (16384, 4096, 4096), (8192, 8192, 8192)]
FORWARD, D_INPUT, D_WEIGHT = 0, 1, 2
#: Variant -> of K in the tensor core; 1 << 20 is all of it.
INTERVALS = {6: 32, 7: 64, 8: 128, 9: 256, 10: 512, 11: 1 << 20}
SWEEP = [
    (m, n, k)
    for m, n in [(128, 8192), (256, 4096), (256, 8192), (512, 2048), (512, 4096), (1024, 1024), (1024, 2048),
                 (1024, 4096), (2048, 1024), (2048, 2048), (4096, 1024), (4096, 4096)]
    for k in (256, 1024, 4096)
]  # fmt: skip


def build() -> str:
    target = f"{tempfile.mkdtemp()}/variants.so"
    flags = ["-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a"]
    flags += ["-Xcompiler=-fPIC", "-shared", "-cudart=static"]
    subprocess.run(["nvcc", *flags, "-o", target, str(HERE / "float32_variants.cu")], check=True)
    return target


class Variants:
    """a [M, K] b [K, N] by a numbered variant; a and b lie as the variant wants them."""

    def __init__(self, path: str) -> None:
        self.run = ctypes.CDLL(path).float32_variant
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.run.argtypes = [i32, pointer, pointer, pointer, i64, i64, i64, i64, i64, i32, i32, pointer]

    def __call__(
        self, variant: int, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, band: int = 4
    ) -> torch.Tensor:
        left = a if a.stride(1) == 1 else a.t()
        right = b if b.stride(1) == 1 else b.t()
        code = self.run(
            variant, left.data_ptr(), right.data_ptr(), out.data_ptr(), a.size(0), b.size(1), a.size(1),
            left.stride(0), right.stride(0), band, 0, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if code:
            raise RuntimeError(f"variant {variant}: CUDA error {code}")
        return out


def lay(variant: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a [M, K], b [K, N] contiguous or transposed in memory."""
    a = a.t().contiguous().t() if variant in (2, 5) else a.contiguous()
    b = b.contiguous() if variant in (1, 2, 4, 5) else b.t().contiguous().t()
    return a, b


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds, the calls in random order in every round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        order = list(calls)
        random.shuffle(order)
        for name in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            if i > 1:
                found[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in found.items()}


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda")


def uniform(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, device="cuda")


def wide(rows: int, columns: int) -> torch.Tensor:
    return normal(rows, columns) * torch.exp2(torch.randint(-20, 21, (rows, columns), device="cuda").float())


def operands(kind: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "cancelling":
        a, b = normal(m, k // 2), normal(k // 2, n)
        return torch.cat([a, a], 1), torch.cat([b, -b * (1 + 2.0**-10 * torch.rand_like(b))], 0)
    make = {"random": normal, "positive": uniform, "2^±20": wide}[kind]
    return make(m, k), make(k, n)


def errors(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor) -> tuple[float, float]:
    """Norm-wise; and element-wise against the sum of |a| |b|, in units of 2^-24."""
    difference = (got.double() - want).abs()
    return float(difference.norm() / want.norm()), float((difference / size).max()) * 2**24


# --- the tables, as the page has them --------------------------------------------------------------------------------

COMMAND = "python benchmarks/device_float32.py --sweep --out benchmarks/device_float32.json"
TIMES = ("M×N×K", "product", "SGEMM ms", "ours ms", "ratio", "TFLOP/s")
ERRORS = ("inputs", "K", "SGEMM", "ours", "ratio", "SGEMM, worst element", "ours, worst element")
BY_INTERVAL = ("inputs", "SGEMM", *(str(i) if i < 1 << 20 else "all of K" for i in INTERVALS.values()), "32, then 2048")
SIZES = ("M×N×K", "SGEMM µs", "256-row µs", "128-row µs", "ratio")


def time_line(shape: str, product: str, sgemm: float, ours: float, rate: float) -> list[str]:
    return [shape, product, f"{sgemm:.3f}", f"{ours:.3f}", f"{sgemm / ours:.2f}", f"{rate:.0f}"]


def error_line(kind: str, k: int, sgemm: float, ours: float, worst_sgemm: float, worst_ours: float) -> list[str]:
    ratio = f"{ours / sgemm:.2f}"
    return [kind, str(k), f"{sgemm:.1e}", f"{ours:.1e}", ratio, f"{worst_sgemm:.1f}", f"{worst_ours:.1f}"]


def sweep_line(m: int, n: int, k: int, sgemm: float, tall: float, low: float, ratio: float) -> list[str]:
    return [f"{m}×{n}×{k}", f"{sgemm:.1f}", f"{tall:.1f}", f"{low:.1f}", f"{ratio:.2f}"]


def shown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> record.Table:
    """Printed, and as it is kept."""
    print(tabulate(lines, headings, disable_numparse=True), flush=True)
    return record.table(headings, lines)


def plot(measured: str, picture: str) -> None:
    """Error against interval, the library's as a line."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "float32"
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    lengths = [min(length, 8192) for length in INTERVALS.values()]
    lines = json.loads(Path(measured).read_text())["tables"]["intervals"]["lines"]
    for row, colour in zip(lines, ("C0", "C1"), strict=True):
        name, sgemm, *by_interval, whole = row
        axes.plot(lengths, [float(e) for e in by_interval], "o-", color=colour, label=name)
        axes.axhline(float(sgemm), color=colour, ls="--", lw=1, label=f"{name}: SGEMM")
        axes.plot([32], [float(whole)], "*", color=colour, ms=11, label=f"{name}: 32, outer sums every 2048")
    axes.set(xscale="log", yscale="log", xlabel="products added in the tensor core (K)", ylabel="norm-wise error")
    axes.set_xticks(lengths, [*map(str, lengths[:-1]), "all 8192"])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    if sys.argv[1:2] == ["--plot"]:
        return plot(*sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--library")
    parser.add_argument("--sweep", action="store_true", help="where the kernel pays, by size")
    parser.add_argument("--out", type=Path, help="write the tables there")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    kernel = Variants(args.library or build())
    tables: dict[str, record.Table] = {}

    rows = []
    for m, n, k in SHAPES:
        products = {"forward": (FORWARD, m, n, k), "d input": (D_INPUT, m, k, n), "d weight": (D_WEIGHT, n, k, m)}
        for name, (variant, rows_, columns, inner) in products.items():
            a, b = lay(variant, normal(rows_, inner), normal(inner, columns))
            out = torch.empty(rows_, columns, device="cuda")
            found = times({"sgemm": lambda: torch.matmul(a, b), "ours": lambda: kernel(variant, a, b, out)}, 12)
            rate = 2e-9 * m * n * k / found["ours"]
            rows.append(time_line(f"{m}×{n}×{k}", name, found["sgemm"], found["ours"], rate))
        time.sleep(0.1)
    tables["times"] = shown(TIMES, rows)

    rows = []
    for kind in ("random", "positive", "2^±20", "cancelling"):
        for k in (16, 128, 1024, 8192, 65536):
            m, n = (1024, 4096) if k <= 8192 else (512, 1024)
            a, b = lay(FORWARD, *operands(kind, m, n, k))
            want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
            out = torch.full((m, n), float("nan"), device="cuda")
            sgemm, ours = errors(torch.matmul(a, b), want, size), errors(kernel(FORWARD, a, b, out), want, size)
            rows.append(error_line(kind, k, sgemm[0], ours[0], sgemm[1], ours[1]))
    tables["errors"] = shown(ERRORS, rows)

    rows = []
    for kind in ("random", "positive"):
        m, n, k = 1024, 2048, 8192
        a, b = lay(FORWARD, *operands(kind, m, n, k))
        want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        out = torch.empty(m, n, device="cuda")
        measured = [errors(kernel(variant, a, b, out), want, size)[0] for variant in INTERVALS]
        whole = errors(kernel(FORWARD, a, b, out), want, size)[0]
        rows.append([kind, *(f"{x:.1e}" for x in (errors(torch.matmul(a, b), want, size)[0], *measured, whole))])
    tables["intervals"] = shown(BY_INTERVAL, rows)

    if args.sweep:
        rows = []
        for m, n, k in SWEEP:
            a, b = lay(FORWARD, normal(m, k), normal(k, n))
            out = torch.empty(m, n, device="cuda")
            calls: dict[str, Callable[[], object]] = {"sgemm": lambda: torch.matmul(a, b)}
            calls |= {"256": lambda: kernel(0, a, b, out), "128": lambda: kernel(3, a, b, out)}
            found = times(calls, 10)
            best = min(found["256"], found["128"])
            rows.append(sweep_line(m, n, k, *(1e3 * found[name] for name in calls), found["sgemm"] / best))
        tables["sweep"] = shown(SIZES, rows)

    if args.out:
        record.write(args.out, COMMAND, tables, torch.device("cuda"))


if __name__ == "__main__":
    main()
