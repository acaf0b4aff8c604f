"""kl_div and distillation_kl kernels alone, on a CUDA device: right against float64, then timed beside the ceiling.

Calls the C functions directly, so that what is measured is the kernels and not the ops around them:

    python benchmarks/device_kl.py [--skip-checks] [--skip-times] [--compare] [--out FILE]

Checks compare with float64 and with eager in the same dtype: norm-wise error at most 1.25 times eager's. Times are
medians of CUDA events; the read ceiling is measured in the same run.
"""

# Every lambda here runs before its loop goes on.
# ruff: noqa: B023
from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fxfuse.kernels.abi import DOUBLE, DTYPE_CODE, I64, INT, PTR, pointer, stream
from fxfuse.kernels.loader import library

DEVICE = "cuda"
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

lib = library()
if lib is None:
    sys.exit("the kernels are not available")
kl_forward = lib.function("fxfuse_kl_div_forward", [PTR] * 6 + [I64, DOUBLE] + [INT] * 5 + [PTR])
kl_backward = lib.function("fxfuse_kl_div_backward", [PTR] * 5 + [I64, DOUBLE] + [INT] * 5 + [PTR])
scale_unless_one = lib.function("fxfuse_scale_unless_one", [PTR, PTR, I64, PTR, I64, INT, INT, PTR])
distill = lib.function("fxfuse_distillation_kl", [PTR] * 7 + [I64, I64] + [DOUBLE] * 4 + [INT] * 4 + [PTR])
scratch_bytes = lib.function("fxfuse_distillation_kl_scratch", [I64, ctypes.POINTER(ctypes.c_int64)])
KL_SCRATCH = 4096


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 777.0, dtype=dtype, device=DEVICE)


def kl(x, t, *, reduction="batchmean", log_target=False, log_input=False, grad_input=False, grad_target=False):
    """(loss, grad_input, grad_target) by the kernels; gradients for an incoming gradient of 1."""
    n, code, s = x.numel(), DTYPE_CODE[x.dtype], stream(0)
    factor = {"mean": 1 / n, "batchmean": 1 / x.shape[0], "sum": 1.0, "none": 1.0}[reduction]
    gi = torch.empty_like(x) if grad_input else None
    gt = torch.empty_like(x) if grad_target else None
    scratch = torch.empty(KL_SCRATCH, dtype=torch.float64, device=DEVICE)
    out = torch.empty_like(x) if reduction == "none" else torch.empty((), dtype=x.dtype, device=DEVICE)
    in_pass = reduction != "none"
    kl_forward(
        pointer(x),
        pointer(t),
        pointer(out),
        pointer(gi) if in_pass else None,
        pointer(gt) if in_pass else None,
        pointer(scratch),
        n,
        factor,
        int(in_pass),
        int(log_target),
        int(log_input),
        code,
        0,
        s,
    )
    if not in_pass and (grad_input or grad_target):
        g = torch.ones((), dtype=x.dtype, device=DEVICE)
        kl_backward(
            pointer(g),
            pointer(x),
            pointer(t),
            pointer(gi),
            pointer(gt),
            n,
            1.0,
            0,
            int(log_target),
            int(log_input),
            code,
            0,
            s,
        )
    return out, gi, gt


def distillation(
    s,
    t,
    *,
    ts=1.0,
    tt=1.0,
    scale=1.0,
    factor=1.0,
    log_target=False,
    grad_s=False,
    grad_t=False,
    road=0,
    g=None,
    loss=True,
):
    rows, vocab = s.shape
    need = ctypes.c_int64()
    scratch_bytes(rows, ctypes.byref(need))
    scratch = torch.empty(need.value, dtype=torch.uint8, device=DEVICE)
    out = torch.empty((), dtype=s.dtype, device=DEVICE) if loss else None
    gs = torch.empty_like(s) if grad_s else None
    gt = torch.empty_like(s) if grad_t else None
    distill(
        pointer(s),
        pointer(t),
        pointer(g),
        pointer(out),
        pointer(gs),
        pointer(gt),
        pointer(scratch),
        rows,
        vocab,
        ts,
        tt,
        factor,
        scale,
        int(log_target),
        road,
        DTYPE_CODE[s.dtype],
        0,
        stream(0),
    )
    return out, gs, gt


def eager_kl(x, t, reduction, log_target, log_input):
    return F.kl_div(x.log() if log_input else x, t, reduction=reduction, log_target=log_target)


def eager_distillation(s, t, ts, tt, scale, reduction, log_target):
    q = F.log_softmax(t / tt, -1) if log_target else F.softmax(t / tt, -1)
    return scale * F.kl_div(F.log_softmax(s / ts, -1), q, reduction=reduction, log_target=log_target)


def with_grads(function, *tensors, grads):
    leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, grads, strict=True)]
    loss = function(*leaves)
    if any(grads):
        loss.sum().backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


class Checks:
    """Compares with float64 beside eager; keeps the worst ratio and what failed."""

    def __init__(self) -> None:
        self.count, self.failures, self.worst = 0, [], 0.0

    def compare(self, what: str, ours, eager, exact) -> None:
        self.count += 1
        if (
            not (ours.isnan() == eager.isnan()).all()
            or not (
                ours.masked_fill(ours.isfinite() | ours.isnan(), 0)
                == eager.masked_fill(eager.isfinite() | eager.isnan(), 0)
            ).all()
        ):
            bad = ((ours.isnan() != eager.isnan()) | (ours.isinf() != eager.isinf())).sum().item()
            self.failures.append(f"{what}: inf or NaN differ at {bad} of {ours.numel()}")
            return
        finite = ours.isfinite()
        if not finite.any():
            return
        o, e, x = ours[finite].double(), eager[finite].double(), exact[finite]
        if not x.isfinite().all():  # eager overflows where float64 does not, and the other way round
            keep = x.isfinite()
            o, e, x = o[keep], e[keep], x[keep]
        norm = x.norm().item()
        error, peer = (o - x).norm().item(), (e - x).norm().item()
        floor = torch.finfo(ours.dtype).eps * norm * (0.6 if ours.numel() < 5000 else 0.15) + 1e-300
        if ours.numel() == 1:
            floor = torch.finfo(ours.dtype).eps * norm + torch.finfo(ours.dtype).tiny
        ratio = error / max(peer, floor)
        self.worst = max(self.worst, ratio)
        if not ratio <= 1.25:
            self.failures.append(
                f"{what}: error {error / (norm + 1e-300):.3g}, eager {peer / (norm + 1e-300):.3g}, ratio {ratio:.3g}"
            )

    def report(self, title: str) -> None:
        print(f"{title}: {self.count} comparisons, {len(self.failures)} failed, worst ratio {self.worst:.3f}")
        for line in self.failures[:200]:
            print("   ", line)


def offset_copy(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A contiguous copy whose address is `elements` past a 16-byte boundary."""
    flat = torch.empty(x.numel() + 16, dtype=x.dtype, device=x.device)
    return flat[elements : elements + x.numel()].view(x.shape).copy_(x)


def check_kl(checks: Checks) -> None:
    inf = float("inf")
    special = torch.tensor([0.0, -0.0, -1.0, inf, -inf, float("nan"), 1.0, 1e-40, 3e38, 0.5, 60000.0, 2.0])
    for dtype, n in itertools.product(NAMES, (1, 7, 1023, 8192 + 3, 1_200_007)):
        rows = 1 if n < 1024 else 7 if n % 7 == 0 else 1
        p = torch.softmax(torch.randn(n, device=DEVICE) * 2, 0).to(dtype).view(rows, -1)
        q = torch.softmax(torch.randn(n, device=DEVICE) * 2, 0).to(dtype).view(rows, -1)
        if dtype == torch.float16:
            p, q = p.clamp_min(1e-4), q.clamp_min(1e-4)
        variants = [("plain", p, q), ("offset", offset_copy(p, 1), q), ("zeros", p, q * (torch.rand_like(q) > 0.5))]
        if n >= 1023:
            grid = torch.cartesian_prod(special, special).to(dtype).to(DEVICE)
            pad = torch.rand(n - len(grid), 2, device=DEVICE).to(dtype)
            both = torch.cat([grid, pad])
            variants.append(("special", both[:, 0].clone().view(1, -1), both[:, 1].clone().view(1, -1)))
        for (kind, x, t), lt, li, reduction, grads in itertools.product(
            variants, (False, True), (False, True), ("batchmean", "mean", "none"), ((0, 0), (1, 0), (1, 1))
        ):
            if n == 1_200_007 and kind != "plain" and reduction == "mean":
                continue
            a = x if li or kind == "special" else x.float().log().to(dtype)
            b = t.float().log().to(dtype) if lt and kind not in ("special",) else t
            if kind == "zeros" and lt:
                continue
            a = offset_copy(a, 1) if kind == "offset" else a
            function = lambda a, b: eager_kl(a, b, reduction, lt, li)  # noqa: E731
            eager = with_grads(function, a, b, grads=[bool(g) for g in grads])
            exact = with_grads(function, a.double(), b.double(), grads=[bool(g) for g in grads])
            for junk in range(2):  # freed blocks full of junk: what is not written shows
                poisoned(n + junk, dtype=dtype)
            ours = kl(a, b, reduction=reduction, log_target=lt, log_input=li, grad_input=grads[0], grad_target=grads[1])
            for name, o, e, x64 in zip(("loss", "grad_input", "grad_target"), ours, eager, exact, strict=True):
                if o is not None:
                    checks.compare(f"kl {NAMES[dtype]} n={n} {kind} {reduction} lt={lt} li={li} {name}", o, e, x64)


def check_distillation(checks: Checks, shapes, roads=(0,), kinds=("plain",)) -> None:
    for dtype, (rows, vocab), kind in itertools.product(NAMES, shapes, kinds):
        s, t = torch.randn(2, rows, vocab, device=DEVICE).mul_(3).to(dtype)
        ts, tt = 2.0, 2.0
        if kind == "offset":
            s = offset_copy(s, 1)
        if kind == "temperatures":
            ts, tt = 0.7, 3.0
        if kind == "cold":
            ts = tt = 1e-2
        if kind == "large":
            s, t = s * 3000, t * 3000
            ts = tt = 1e3
        if kind == "masked":
            t = t.masked_fill(torch.rand_like(t, dtype=torch.float) < 0.3, -float("inf"))
        if kind == "special":
            s, t = s.clone(), t.clone()
            s[0, vocab // 2] = -float("inf")
            t[-1, 0] = float("inf")
            if rows > 2:
                s[1, vocab - 1] = float("nan")
                t[2, :] = -float("inf")
        for lt, road, grads in itertools.product((False, True), roads, ((0, 0), (1, 0), (1, 1))):
            function = lambda s, t: eager_distillation(s, t, ts, tt, ts * tt, "batchmean", lt)  # noqa: E731
            eager = with_grads(function, s, t, grads=[bool(g) for g in grads])
            exact = with_grads(function, s.double(), t.double(), grads=[bool(g) for g in grads])
            for _ in range(2):
                poisoned(rows, vocab, dtype=dtype)
            try:
                ours = distillation(
                    s,
                    t,
                    ts=ts,
                    tt=tt,
                    scale=ts * tt,
                    factor=1 / rows,
                    log_target=lt,
                    road=road,
                    grad_s=grads[0],
                    grad_t=grads[1],
                )
                again = distillation(
                    s,
                    t,
                    ts=ts,
                    tt=tt,
                    scale=ts * tt,
                    factor=1 / rows,
                    log_target=lt,
                    road=road,
                    grad_s=grads[0],
                    grad_t=grads[1],
                )
            except RuntimeError as error:
                if "InvalidValue" in str(error):  # the road named does not take this shape
                    continue
                raise
            for name, o, o2, e, x64 in zip(("loss", "grad_s", "grad_t"), ours, again, eager, exact, strict=True):
                if o is None:
                    continue
                what = f"distill {NAMES[dtype]} {rows}x{vocab} {kind} lt={lt} road={road} grads={grads} {name}"
                checks.compare(what, o, e, x64)
                if not torch.equal(o.nan_to_num(), o2.nan_to_num()):
                    checks.failures.append(f"{what}: two runs differ")


READ_KERNEL = r"""
#include <cstdint>
__global__ void __launch_bounds__(512) read_kernel(const uint4* p, int64_t n, unsigned* out) {
  unsigned x = 0;
  int64_t i = (int64_t(blockIdx.x) * 8) * 512 + threadIdx.x;
  for (; i + 7 * 512 < n; i += int64_t(gridDim.x) * 8 * 512) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[k].x), "=r"(v[k].y),
                   "=r"(v[k].z), "=r"(v[k].w) : "l"(p + i + k * 512));
#pragma unroll
    for (int k = 0; k < 8; ++k) x ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  if (x == 0x12345678u) *out = x;
}
extern "C" int read_all(const void* p, int64_t bytes, void* out, int blocks, void* stream) {
  read_kernel<<<blocks, 512, 0, (cudaStream_t)stream>>>((const uint4*)p, bytes / 16, (unsigned*)out);
  return cudaGetLastError();
}
"""


def median_ms(function, repeat: int = 30, warm: int = 5) -> float:
    for _ in range(warm):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings() -> dict[str, float]:
    """TB/s: reading alone, and copying (bytes read plus bytes written)."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "read.cu"), Path(folder, "read.so")
        source.write_text(READ_KERNEL)
        subprocess.run(
            [
                "nvcc",
                "-O3",
                "-shared",
                "-Xcompiler=-fPIC",
                "-gencode=arch=compute_90a,code=sm_90a",
                "-cudart=static",
                "-o",
                str(target),
                str(source),
            ],
            check=True,
        )
        read = ctypes.CDLL(str(target)).read_all
    read.argtypes = [PTR, I64, PTR, INT, PTR]
    data = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    best = min(
        median_ms(lambda b=b: read(pointer(data), data.nbytes, pointer(out), b, stream(0)))
        for b in (sms * 2, sms * 3, sms * 4, sms * 16)
    )
    other = torch.empty_like(data)
    copy = median_ms(lambda: other.copy_(data))
    return {"read": data.nbytes / best / 1e9, "copy": 2 * data.nbytes / copy / 1e9}


def times(rows: list[list[Any]], ceiling: dict[str, float], compare: bool) -> None:
    def line(name, ms, bytes_moved, kind, bar=None, eager=None, compiled=None):
        limit = bytes_moved / ceiling[kind] / 1e9
        rows.append([name, ms, limit, limit / ms * 100, bar, eager, compiled])
        print("  ".join(str(v if not isinstance(v, float) else round(v, 4)) for v in rows[-1]), flush=True)

    compile_ = torch.compile(eager_distillation, dynamic=False) if compare else None
    compile_kl = torch.compile(eager_kl, dynamic=False) if compare else None

    def fwd_bwd(function, *leaves):
        for leaf in leaves:
            leaf.grad = None
        function().backward()

    for dtype, bars in ((torch.float32, (0.54, 0.82)), (torch.bfloat16, (0.28, 0.43)), (torch.float16, (None, None))):
        n = 16384
        p, q = (torch.softmax(torch.randn(n, n, device=DEVICE), -1).to(dtype) for _ in range(2))
        lp, name, size = p.log(), NAMES[dtype], p.nbytes
        eager = median_ms(lambda: eager_kl(p, q, "batchmean", False, True), 10) if compare else None
        comp = median_ms(lambda: compile_kl(p, q, "batchmean", False, True), 20) if compare else None
        line(
            f"kl_div(log p) {name} fwd",
            median_ms(lambda: kl(p, q, log_input=True)),
            2 * size,
            "read",
            bars[0],
            eager,
            comp,
        )
        eager = comp = None
        if compare:
            leaf = p.clone().requires_grad_()
            eager = median_ms(lambda: fwd_bwd(lambda: eager_kl(leaf, q, "batchmean", False, True), leaf), 10)
            comp = median_ms(lambda: fwd_bwd(lambda: compile_kl(leaf, q, "batchmean", False, True), leaf), 20)
        line(
            f"kl_div(log p) {name} fwd+grad",
            median_ms(lambda: kl(p, q, log_input=True, grad_input=True)),
            3 * size,
            "copy",
            bars[1],
            eager,
            comp,
        )
        line(f"kl_div {name} fwd", median_ms(lambda: kl(lp, q)), 2 * size, "read")
        line(f"kl_div {name} fwd+grad", median_ms(lambda: kl(lp, q, grad_input=True)), 3 * size, "copy")
        if dtype != torch.float16:
            line(
                f"kl_div {name} fwd+both grads",
                median_ms(lambda: kl(lp, q, grad_input=True, grad_target=True)),
                4 * size,
                "copy",
            )
            line(f"kl_div {name} none", median_ms(lambda: kl(lp, q, reduction="none")), 3 * size, "copy")
            z = q * (torch.rand(n, n, device=DEVICE) > 0.5)
            line(
                f"kl_div(log p) {name} fwd, half the targets 0",
                median_ms(lambda z=z: kl(p, z, log_input=True)),
                2 * size,
                "read",
            )
            lz = z.log()
            line(f"kl_div {name} log_target fwd", median_ms(lambda: kl(lp, lz, log_target=True)), 2 * size, "read")
            x = offset_copy(lp, 1)
            line(f"kl_div {name} misaligned fwd", median_ms(lambda x=x: kl(x, q)), 2 * size, "read")
        one, two = (torch.full((), v, dtype=dtype, device=DEVICE) for v in (1.0, 2.0))
        for label, g, moved in (("1", one, 1), ("2", two, 2 * size)):
            line(
                f"scale_unless_one {name} g={label}",
                median_ms(
                    lambda g=g: scale_unless_one(
                        pointer(g), pointer(lp), lp.numel(), None, 0, DTYPE_CODE[dtype], 0, stream(0)
                    )
                ),
                moved,
                "copy",
            )
    bars = {(torch.float32, 0): 1.1, (torch.float32, 1): 1.7, (torch.bfloat16, 0): 0.6, (torch.bfloat16, 1): 0.95}
    shapes = [
        (4096, 128256),
        (65536, 512),
        (8, 1_000_000),
        (1, 128256),
        (4096, 50257),
        (16384, 4096),
        (8192, 32000),
        (65536, 1000),
        (2048, 151936),
        (65536, 10),
    ]
    for (r, v), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        s, t = (torch.randn(r, v, device=DEVICE, dtype=dtype) for _ in range(2))
        main = (r, v) == (4096, 128256)
        compared = compare and (r, v) in shapes[:5]
        for grad in (0, 1):
            eager = comp = None
            if compare:
                leaf = s.clone().requires_grad_(bool(grad))
                run = [
                    lambda f=f: f(leaf, t, 2.0, 2.0, 4.0, "batchmean", False) for f in (eager_distillation, compile_)
                ]
                if grad:
                    run = [lambda f=f: fwd_bwd(f, leaf) for f in run]
                eager = median_ms(run[0], 8, 2)
                comp = median_ms(run[1], 15) if compared else None
            for road in (0, 2, 3):

                def call(s=s, t=t, r=r, road=road, grad=grad):
                    return distillation(s, t, ts=2.0, tt=2.0, scale=4.0, factor=1 / r, grad_s=grad, road=road)

                try:
                    call()
                except RuntimeError:
                    continue
                line(
                    f"distill {NAMES[dtype]} {r}x{v} {'fwd+grad' if grad else 'fwd'} road {road}",
                    median_ms(call),
                    (2 + grad) * s.nbytes,
                    "copy" if grad else "read",
                    bars.get((dtype, grad)) if main else None,
                    eager,
                    comp,
                )
                eager = comp = None


def call_overhead() -> dict[str, float]:
    """Microseconds of host time a call takes, launches included."""
    x = torch.randn(64, 64, device=DEVICE)
    out, scratch = torch.empty((), device=DEVICE), torch.empty(KL_SCRATCH, dtype=torch.float64, device=DEVICE)
    code = ctypes.CDLL(str(lib.path)).fxfuse_compute_capability
    code.argtypes, code.restype = [PTR, INT], INT
    cc = ctypes.c_int()

    def per_call(function, n=2000):
        for _ in range(50):
            function()
        torch.cuda.synchronize()
        best = 1e9
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(n // 5):
                function()
            best = min(best, (time.perf_counter() - start) / (n // 5) * 1e6)
            torch.cuda.synchronize()
        return best

    args = (
        pointer(x),
        pointer(x),
        pointer(out),
        None,
        None,
        pointer(scratch),
        x.numel(),
        1.0,
        1,
        1,
        0,
        0,
        0,
        stream(0),
    )
    address = ctypes.addressof(cc)
    return {
        "ctypes call that launches nothing": per_call(lambda: code(address, 0)),
        "kl_div forward, one launch, arguments ready": per_call(lambda: kl_forward(*args)),
        "kl_div forward with its allocations": per_call(lambda: kl(x, x, log_target=True)),
        "distillation 64x64 with its allocations": per_call(lambda: distillation(x, x)),
        "torch x + x": per_call(lambda: x + x),
        "stream handle": per_call(lambda: stream(0)),
    }


def streams_and_graphs() -> None:
    s, t = torch.randn(2, 64, 32000, device=DEVICE)
    x, q = torch.log_softmax(s, -1), torch.softmax(t, -1)
    want = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True) if a is not None), "side stream"
    s2, t2 = torch.randn(2, 64, 32000, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    s.copy_(s2)
    t.copy_(t2)
    x.copy_(torch.log_softmax(s, -1))
    q.copy_(torch.softmax(t, -1))
    graph.replay()
    want = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    assert all(torch.equal(a, b) for a, b in zip(want, held, strict=True) if a is not None), "graph"
    print("default stream, side stream, CUDA graph: same bits")


def huge() -> None:
    """2.2 G elements in bfloat16: indices past 2**31."""
    n, v = 17_200, 128_000
    a, b = (torch.empty(n, v, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    start = time.perf_counter()
    total, grad, _ = distillation(a, b, grad_s=True, factor=1.0)
    parts = [distillation(x, y, grad_s=True) for x, y in zip(a.split(4300), b.split(4300), strict=True)]
    assert torch.equal(grad[-4300:], parts[-1][1]), "distillation past 2**31"
    assert abs(total.item() / sum(p[0].item() for p in parts) - 1) < 5e-3
    del grad, parts
    loss, gi, _ = kl(a, b, log_target=True, reduction="sum", grad_input=True)
    tail = kl(a[-100:], b[-100:], log_target=True, reduction="sum", grad_input=True)
    assert torch.equal(gi[-100:], tail[1]), "kl_div past 2**31"
    del gi
    one = kl(a, b, log_target=True, reduction="none")[0]
    assert torch.equal(one[-100:], kl(a[-100:], b[-100:], log_target=True, reduction="none")[0])
    assert abs(one.sum(dtype=torch.float64).item() / loss.double().item() - 1) < 1e-2
    torch.cuda.synchronize()
    print(f"{n * v / 1e9:.2f} G elements: right ({time.perf_counter() - start:.1f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--compare", action="store_true", help="time eager and torch.compile too")
    parser.add_argument("--out", help="JSON file for every number")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, lib, "portable" if os.environ.get("FXFUSE_PORTABLE") else "")
    failed = False
    if not options.skip_checks:
        start = time.perf_counter()
        checks = Checks()
        check_kl(checks)
        checks.report("kl_div")
        failed |= bool(checks.failures)
        checks = Checks()
        check_distillation(
            checks,
            [(3, 10), (65, 512), (17, 1000), (33, 1024), (9, 5003), (6, 32000), (5, 50257)],
            roads=(0, 2, 3),
            kinds=("plain", "offset", "temperatures", "cold", "large", "masked", "special"),
        )
        check_distillation(checks, [(300, 4096), (5, 128256), (3, 200003), (2, 1_000_000)], roads=(0, 3))
        checks.report("distillation_kl")
        failed |= bool(checks.failures)
        streams_and_graphs()
        if not os.environ.get("FXFUSE_PORTABLE"):
            huge()
        print(f"checks took {time.perf_counter() - start:.1f} s", flush=True)
    rows: list[list[Any]] = []
    if not options.skip_times:
        ceiling = ceilings()
        overhead = call_overhead()
        times(rows, ceiling, options.compare)
        print("ceilings, TB/s:", {k: round(v, 3) for k, v in ceiling.items()})
        print(tabulate(rows, ["what", "ms", "limit", "% of limit", "bar", "eager", "compile"], floatfmt=".4g"))
        print(tabulate(overhead.items(), ["host time of a call", "us"], floatfmt=".2f"))
        if options.out:
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
            Path(options.out).write_text(
                json.dumps({"machine": machine, "ceilings": ceiling, "overhead_us": overhead, "rows": rows}, indent=1)
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
