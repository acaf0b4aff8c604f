"""kl_div and distillation_kl over many sizes, through the ops: where eager or torch.compile is faster.

    python benchmarks/sweep_kl.py [--compile] [--only kl_div|distillation_kl|..] [--dtypes fp32,bf16,fp16] [--budget S]
                                  [--json FILE] [--warm I/N]

Reduced ("batchmean") and elementwise ("none", with an incoming gradient of every element) losses. Calls of the three
are interleaved and timed with CUDA events, host included; medians. One line for every size where we are slower than
eager, or (above a million elements, with --compile) than torch.compile, and a count; all times go to FILE. Compiling
takes longer than measuring: N processes with --warm 0/N, 1/N, .. fill torch.compile's cache side by side, and measure
nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fxfuse.bench import record
from fxfuse.ops.distillation_kl import distillation_kl
from fxfuse.ops.kl_div import kl_div

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = [
    (1, 10), (1, 1000), (1, 32000), (1, 128256), (1, 1_000_003), (8, 1_000_000), (32, 50257), (64, 128256),
    (256, 32000), (1024, 50257), (1024, 1000), (1024, 151936), (4096, 32000), (4096, 128256), (8192, 8191),
    (16384, 4096), (16384, 32000), (65536, 10), (65536, 512), (65536, 1000), (65536, 8192), (17200, 128000),
]  # fmt: skip
MOST_BYTES = 5 << 30  # of a tensor: the last size, of 2.2 G elements, is for half types
Loss = Callable[[Tensor, Tensor], Tensor]
Row = tuple[str, str, str, tuple[int, int], dict[str, float]]  # loss, precision, mode, size, ms by rival


def eager_kl(reduction: str) -> Loss:
    return lambda x, t: F.kl_div(x.log(), t, reduction=reduction)


def eager_distillation(reduction: str) -> Loss:
    return lambda s, t: 4.0 * F.kl_div(F.log_softmax(s / 2.0, -1), F.softmax(t / 2.0, -1), reduction=reduction)


def our_kl(reduction: str) -> Loss:
    return lambda x, t: kl_div(x, t, reduction, False, True)


def our_distillation(reduction: str) -> Loss:
    return lambda s, t: distillation_kl(s, t, -1, 2.0, 2.0, 4.0, reduction)


OPS: dict[str, tuple[Loss, Loss]] = {
    "kl_div": (our_kl("batchmean"), eager_kl("batchmean")),
    "distillation_kl": (our_distillation("batchmean"), eager_distillation("batchmean")),
    "kl_div_none": (our_kl("none"), eager_kl("none")),
    "distillation_kl_none": (our_distillation("none"), eager_distillation("none")),
}


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median ms of each call; every round runs all of them, in an order drawn anew: what runs after torch.compile's
    code finds its own out of the caches."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, order, draw = time.perf_counter(), list(calls.items()), random.Random(0)
    while len(times["ours"]) < 9 or (time.perf_counter() - start < seconds and len(times["ours"]) < 100):
        draw.shuffle(order)
        for name, call in order:
            one, two = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            one.record()
            call()
            two.record()
            two.synchronize()
            times[name].append(one.elapsed_time(two))
    return {name: statistics.median(all_) for name, all_ in times.items()}


def summary(rows: list[Row]) -> record.Table:
    """Per loss, precision and mode: how many sizes, and where each rival comes nearest."""
    lines: list[list[str]] = []
    for key in dict.fromkeys(row[:3] for row in rows):
        mine = [row for row in rows if row[:3] == key]
        cells = [*key, str(len(mine))]
        for rival in ("eager", "compile"):
            ratios = [(row[4][rival] / row[4]["ours"], row[3]) for row in mine if rival in row[4]]
            least, shape = min(ratios, default=(0.0, ()))
            cells += [f"{len(ratios)}", f"{least:.2f}×" if ratios else "", "×".join(map(str, shape))]
        lines.append(cells)
    headings = ["loss", "precision", "mode", "sizes"]
    for rival in ("eager", "torch.compile"):
        headings += [f"against {rival}", "least", "at"]
    return record.table(headings, lines, 3)


def times(rows: list[Row]) -> record.Table:
    """Every comparison, ms."""
    cells = []
    for *key, shape, ms in rows:
        by_rival = (f"{ms[who]:.4f}" if who in ms else "" for who in ("ours", "eager", "compile"))
        cells.append([*key, "×".join(map(str, shape)), *by_rival])
    return record.table(["loss", "precision", "mode", "size", "fxfuse", "eager", "torch.compile"], cells, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=OPS)
    parser.add_argument("--dtypes", default="fp32,bf16,fp16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", help="I/N: only compile, for every N-th size from the I-th on")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; sizes that are left are skipped")
    options = parser.parse_args()
    share, shares = map(int, options.warm.split("/")) if options.warm else (0, 1)
    start, done, skipped, slower = time.perf_counter(), 0, 0, 0
    rows: list[Row] = []
    torch.manual_seed(0)
    for name, (ours, eager) in OPS.items():
        if options.only not in (None, name):
            continue
        for label in options.dtypes.split(","):
            for shape in SIZES[share::shares]:
                if shape[0] * shape[1] * DTYPES[label].itemsize > MOST_BYTES:
                    continue
                if time.perf_counter() - start > options.budget:
                    skipped += 1
                    continue
                x, t = (torch.randn(shape, device="cuda", dtype=DTYPES[label]) for _ in range(2))
                if name.startswith("kl_div"):
                    x, t = x.softmax(-1).clamp_min_(1e-6), t.softmax(-1)
                torch._dynamo.reset()
                rivals = {"ours": ours, "eager": eager}
                if options.compile and x.numel() > 1_000_000:
                    rivals["compile"] = torch.compile(eager, dynamic=False)
                leaf = x.detach().requires_grad_()
                grad = torch.randn_like(x) if name.endswith("none") else None
                for mode in ("fwd", "fwd+bwd"):
                    calls: dict[str, Callable[[], object]] = {}
                    for who, loss in rivals.items():
                        if mode == "fwd":
                            calls[who] = lambda loss=loss, x=x, t=t: loss(x, t)
                        else:
                            calls[who] = lambda loss=loss, t=t, leaf=leaf, grad=grad: torch.autograd.grad(
                                loss(leaf, t), leaf, grad
                            )
                    if options.warm:
                        calls.get("compile", int)()
                        continue
                    found = medians(calls, 0.1)
                    done += 1
                    rows.append((name, label, mode, shape, found))
                    if min(found.values()) < found["ours"]:
                        slower += 1
                        numbers = "  ".join(f"{who} {ms:.4f}" for who, ms in found.items())
                        print(f"{name} {label} {shape[0]}x{shape[1]} {mode}: {numbers}", flush=True)
                del x, t, leaf, grad
    print(f"{done} comparisons, {slower} where another is faster, {skipped} sizes skipped; ms")
    if options.json:
        command = " ".join(["python benchmarks/sweep_kl.py", *sys.argv[1:]])
        command = command.replace(str(options.json), options.json.name)
        record.write(options.json, command, {"losses": summary(rows), "sizes": times(rows)}, torch.device("cuda"))


if __name__ == "__main__":
    main()
