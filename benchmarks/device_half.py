"""Products of 16-bit matrices by the Hopper GEMM beside the library's, on sizes drawn at random: where it pays.

Run on an H100 or H200: ``python benchmarks/device_half.py [--json FILE.json]``. Every product is a CUDA graph, those of
a size are timed in turn. ``gemm.pays`` was drawn from such a run, ``device_half.json``: its last column says what the
rule makes of each size. Without ``--seed`` the sizes are others each time.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxfuse.bench import graphs, record
from fxfuse.bench.timing import time_together
from fxfuse.kernels import gemm, half_gemm, loader

SIDES = [256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2304, 3072, 4096, 5120, 8192, 11008, 16384, 32768]
DEPTHS = [512, 768, 1024, 2048, 4096, 8192, 16384]
HEADINGS = ["M", "N", "K", "tiles", "of the last rounds", "of the tiles", "dY W", "dY^T X", "us", "us ", "taken"]


def sizes(count: int) -> list[tuple[int, int, int]]:
    """Results of 100 tiles of 128 x 256 and more, of which the result covers at least four fifths."""
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        m, n, k = random.choice(SIDES), random.choice(SIDES), random.choice(DEPTHS)
        columns = -(-n // 256)
        large = m * n * k <= 2**38 and max(m * k, n * k, m * n) <= 2**28
        if large and -(-m // 256) * columns >= 50 and 256 * columns <= n + n // 4 and (m, n, k) not in found:
            found.append((m, n, k))
    return found


def microseconds(steps: dict[str, Callable[[int], Any]], m: int, n: int, k: int) -> dict[str, float]:
    """Of each step, by graphs timed in turn."""
    device = torch.device("cuda", torch.cuda.current_device())
    calls = max(1, min(20, int(1500 / (2 * m * n * k / 650e6))))
    held = {name: graphs.replaying(graphs.capture(step, calls, device)) for name, step in steps.items()}
    return {name: 1e3 * t.median_ms / calls for name, t in time_together(held, device, rounds=9).items()}


def line(m: int, n: int, k: int) -> list[object]:
    """One size, the product by the weight's layout and by its gradient's."""
    a, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (k, n)))
    at = torch.randn(k, m, device="cuda", dtype=torch.bfloat16).t()
    us = microseconds({
        "library": lambda i: torch.mm(a, b), "ours": lambda i: half_gemm.matmul(a, b),
        "library, across": lambda i: torch.mm(at, b), "ours, across": lambda i: half_gemm.matmul(at, b),
    }, m, n, k)  # fmt: skip
    device = torch.cuda.current_device()
    tiles = -(-m // 256) * 2 * -(-n // 256)
    rounds = tiles / gemm.processors(device)
    ratios = us["library"] / us["ours"], us["library, across"] / us["ours, across"]
    return [
        m, n, k, tiles, f"{rounds / math.ceil(rounds):.2f}", f"{m * n / (tiles * 128 * 256):.2f}",
        *[f"{ratio:.3f}" for ratio in ratios], f"{us['ours']:.0f}", f"{us['ours, across']:.0f}",
        "yes" if gemm.pays(m, n, k, device) else "no",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=90, help="sizes (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of the sizes")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()
    assert loader.library() is not None, loader.why_unavailable()
    random.seed(options.seed)
    lines = sorted((line(*size) for size in sizes(options.count)), key=lambda cells: str(cells[-1]))
    print(tabulate(lines, HEADINGS))
    if options.json:
        table = {"sizes": record.table(HEADINGS, lines)}
        record.write(options.json, "python benchmarks/device_half.py", table, torch.device("cuda"))


if __name__ == "__main__":
    main()
