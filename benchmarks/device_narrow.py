"""Products that few tiles cover: the Hopper GEMM's narrow tiles with everything behind the product in their epilogue,
beside the library's product and a pass behind it, and beside ``small_gemm``, on sizes drawn at random: where each pays.

Run on an H100 or H200: ``python benchmarks/device_narrow.py [--json FILE.json]``. Every call is in a CUDA graph, those
of a size are timed in turn. The rules for these sizes (``narrow_rule``) were drawn from two such runs; a third is
``device_narrow.json``. Those for IEEE float32 (``--dtype fp32``) were drawn from ``device_narrow_fp32.json``. Without
``--seed`` the sizes are others each time. What the rules make of a file's sizes, on any machine:
``python benchmarks/device_narrow.py --rules FILE.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn import functional as F

from fxfuse.bench import graphs, record
from fxfuse.bench.timing import time_together
from fxfuse.kernels import linear_activation_scale as las
from fxfuse.kernels import linear_scale_batchnorm1d as lsb
from fxfuse.kernels import loader, narrow_rule, small_gemm, small_rule

ROWS = [2, 16, 32, 64, 100, 128, 200, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096]
SIDES = [64, 128, 256, 320, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192]
DEPTHS = [64, 128, 256, 512, 768, 1000, 1024, 2048, 3000, 4096, 8192]
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}  # fp32: IEEE
OPS, ROADS = ("activation", "evaluation", "training"), ("narrow", "library", "small")
HEADINGS = ["", "M", "N", "K", "tiles", *[f"{op}, {road}" for op in OPS for road in ROADS]]
CALLS = 20


def sizes(count: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        size = m, n, _ = random.choice(ROWS), random.choice(SIDES), random.choice(DEPTHS)
        if -(-m // 128) * -(-n // 128) <= 132 and size not in found:
            found.append(size)
    return found


def line(name: str, m: int, n: int, k: int) -> list[object]:
    """Microseconds of one size."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    dtype, device = DTYPES[name], torch.device("cuda", torch.cuda.current_device())
    x, w = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype)
    b, s, mean, var = torch.rand(4, n, device="cuda", dtype=dtype).unbind()
    c, act = lsb.Columns(b, s, None, 1.0, s, b, 1e-5), las.Act("relu", 0.0, 0.0, 1.0, 0.5)

    def product(bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, w, bias)

    steps: dict[str, Callable[[int], Any]] = {
        "activation, narrow": lambda i: las.forward(x, w, b, act),
        "activation, library": lambda i: las.apply(z := product(b), act, z),
        "evaluation, narrow": lambda i: lsb.eval_product(x, w, c, mean, var, dtype),
        "evaluation, library": lambda i: lsb.eval_apply(z := product(), c, mean, var, z),
        "training, library": lambda i: lsb.train_apply(z := product(), None, c, mean, var, 0.1, z),
    }
    if m <= 1024:
        steps["training, narrow"] = lambda i: lsb.train(x, w, c, mean, var, 0.1, False)
    if m <= 256:
        act_launch = small_gemm.activation(x, w, b, act)
        launches = [small_gemm.batchnorm(x, w, c, mean, var, dtype, training, 0.1) for training in (False, True)]
        steps["activation, small"] = lambda i: act_launch(x)
        steps["evaluation, small"] = lambda i: launches[0](x)
        steps["training, small"] = lambda i: launches[1](x)
    held = {name: graphs.replaying(graphs.capture(step, CALLS, device)) for name, step in steps.items()}
    us = {name: 1e3 * t.median_ms / CALLS for name, t in time_together(held, device, rounds=7).items()}
    tiles = -(-m // 128) * -(-n // 64)
    return [name, m, n, k, tiles, *[round(us[h], 2) if h in us else None for h in HEADINGS[5:]]]


def chosen(op: str, m: int, n: int, k: int, size: int, exact: bool, processors: int) -> str:
    """The road by the rules, where the host does not count."""
    taken = narrow_rule.pays(m, n, k, size, exact, op, processors)
    narrow = {"narrow": narrow_rule.us(m, n, k, size, exact, op, processors)} if taken else {}
    if small_rule.pays(m, n, k, size, exact, op, processors, captured=True, **narrow):
        return "small"
    return "narrow" if taken else "library"


def judge(file: Path) -> None:
    """Prints what the rules choose of a file's sizes, beside the best road and the library's."""
    found = json.loads(file.read_text())
    processors, rows = found["machine"]["multiprocessors"], []
    for name, *cells in found["tables"]["sizes"]["lines"]:
        m, n, k = map(int, cells[:3])
        for i, op in enumerate(OPS):
            us = {r: float(c) for r, c in zip(ROADS, cells[4 + 3 * i :], strict=False) if c not in ("", "None")}
            road = chosen(op, m, n, k, DTYPES[name].itemsize, name == "fp32", processors)
            rows.append((name, m, n, k, op, road, us[road], us[road] / min(us.values()), us[road] - us["library"]))
    headings = ["", "M", "N", "K", "", "chosen", "us", "of the best", "us more than the library's"]
    print(tabulate(sorted(rows, key=lambda row: -row[-2])[:20], headings, floatfmt=".2f"))
    losses, more = [row[-2] for row in rows], max(row[-1] for row in rows)
    print(f"\n{len(rows)} calls: {statistics.mean(losses):.3f} of the best on the mean, {max(losses):.2f} at most; "
          f"at most {more:.1f} us more than the library's product and its pass")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=90, help="sizes (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES], help="default: all")
    parser.add_argument("--seed", type=int, help="of the sizes")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--rules", type=Path, help="a file of such sizes: only say what the rules make of it")
    options = parser.parse_args()
    if options.rules:
        judge(options.rules)
        return
    assert loader.library() is not None, loader.why_unavailable()
    random.seed(options.seed)
    lines = [line(name, *size) for name in options.dtype for size in sizes(options.count)]
    print(tabulate(lines, HEADINGS))
    if options.json:
        table = {"sizes": record.table(HEADINGS, lines)}
        record.write(options.json, " ".join(["python", *sys.argv]), table, torch.device("cuda"))


if __name__ == "__main__":
    main()
