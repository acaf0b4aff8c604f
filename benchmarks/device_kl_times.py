"""Times of kl_div's and distillation_kl's kernels on a CUDA device, the read and copy ceilings, a call's host time."""

# Every lambda here runs before its loop goes on.
# ruff: noqa: B023
from __future__ import annotations

import ctypes
import itertools
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from device_kl_calls import (
    DEVICE,
    KL_SCRATCH,
    NAMES,
    distillation,
    eager_distillation,
    eager_kl,
    kl,
    kl_forward,
    lib,
    offset_copy,
    scale_unless_one,
)

from fxfuse.kernels.abi import DTYPE_CODE, I64, INT, PTR, pointer, stream

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
    certain_teachers(line, compare)


def certain_teachers(line, compare: bool) -> None:
    """Gradients of student and teacher where the teacher is nearly certain in no row, every tenth or all of them."""
    rows, vocab = 4096, 128256
    for dtype, every in itertools.product((torch.float32, torch.bfloat16), (0, 10, 1)):
        s, t = (torch.randn(rows, vocab, device=DEVICE, dtype=dtype) for _ in range(2))
        if every:
            t[::every, 7] = 60.0

        def call(s=s, t=t):
            return distillation(s, t, ts=2.0, tt=2.0, scale=4.0, factor=1 / rows, grad_s=True, grad_t=True)

        leaves = [x.clone().requires_grad_() for x in (s, t)]

        def eager(leaves=leaves):
            torch.autograd.grad(eager_distillation(*leaves, 2.0, 2.0, 4.0, "batchmean", False), leaves)

        line(
            f"distill {NAMES[dtype]} {rows}x{vocab} both grads, certain: {f'1 of {every}' if every else 'none'}",
            median_ms(call),
            4 * s.nbytes,
            "copy",
            None,
            median_ms(eager, 8, 2) if compare else None,
        )


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
