"""The Hopper GEMM by itself, against torch.matmul (cuBLAS) in the same run: checked against float64, then timed.

Run on an H100 or H200: ``python benchmarks/device_gemm.py [--out FILE.json]``.
Compiles ``gemm_variants.cu`` with nvcc into a temporary folder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CODE = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
#: Variant -> tile columns, stages, cluster, store buffers, stages by which the second warpgroup lags.
NAMES = {
    0: "256 4 2 2 0",
    1: "256 3 2 4 0",
    2: "256 4 1 2 0",
    3: "128 6 2 2 0",
    4: "256 4 2 2 1",
    5: "256 4 2 2 2",
    6: "256 3 2 4 1",
}
SHAPES = [(1024, 8192, 8192), (16384, 4096, 4096), (8192, 8192, 8192)]


def build() -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    target = f"{folder}/variants.so"
    flags = ["-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a"]
    flags += ["-Xcompiler=-fPIC", "-shared", "-cudart=static"]
    subprocess.run(["nvcc", *flags, "-o", target, str(HERE / "gemm_variants.cu")], check=True)
    return ctypes.CDLL(target)


def runner(lib: ctypes.CDLL):
    fn = lib.gemm_variant
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    fn.argtypes = [i32, ptr, ptr, ptr, i64, i64, i64, i32, i32, i32, ptr]

    def run(variant: int, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, band: int) -> None:
        m, k = a.shape
        code = fn(
            variant,
            a.data_ptr(),
            b.data_ptr(),
            out.data_ptr(),
            m,
            b.shape[0],
            k,
            band,
            CODE[a.dtype],
            0,
            torch.cuda.current_stream().cuda_stream,
        )
        if code:
            raise RuntimeError(f"variant {variant}: CUDA error {code}")

    return run


def check(run, variants: list[int]) -> bool:
    fine = True
    shapes = [(128, 256, 64), (1024, 512, 1024), (1000, 520, 328), (77, 264, 40), (513, 1032, 8), (3000, 1024, 4096)]
    for dtype in CODE:
        for m, n, k in shapes:
            a = torch.randn(m, k, device="cuda", dtype=dtype)
            b = torch.randn(n, k, device="cuda", dtype=dtype)
            want = a.double() @ b.double().T
            torch.backends.cuda.matmul.allow_tf32 = True
            library = ((a @ b.T).double() - want).norm() / want.norm()
            for v in variants:
                for band in (1, 8):
                    out = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
                    run(v, a, b, out, band)
                    torch.cuda.synchronize()
                    error = (out.double() - want).norm() / want.norm()
                    if not error <= 1.25 * library:
                        print(f"WRONG variant {v} {dtype} {m}x{n}x{k} band {band}: {error:.2e}, library {library:.2e}")
                        fine = False
    return fine


def interleaved(calls: dict, rounds: int = 15, block_ms: float = 8.0) -> dict[str, float]:
    """Milliseconds of each call: medians over rounds in which every call gets its turn, so that clocks, which sink as
    the device warms up, are the same for all."""

    def block(call, count: int) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / count

    counts = {}
    for name, call in calls.items():
        block(call, 3)
        counts[name] = max(1, int(block_ms / block(call, 5)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        order = list(calls)
        random.shuffle(order)  # what runs before a call decides how warm the device is
        for name in order:
            ms = block(calls[name], counts[name])
            if turn >= 2:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def products(run, args) -> dict:
    """The bare product of each variant."""
    calls = {}
    for m, n, k, dtype in args.problem:
        a, b = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype)
        out = torch.empty(m, n, device="cuda", dtype=dtype)
        calls["cublas"] = lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out)
        for v in args.variants:
            for band in args.bands:
                calls[f"{NAMES[v]} band {band}"] = lambda v=v, band=band, a=a, b=b, out=out: run(v, a, b, out, band)
    return calls


def ops(args) -> dict:
    """The ops' forward roads beside the bare product and eager PyTorch."""
    from torch.nn import functional as F

    from fxfuse.kernels import linear_activation_scale as las
    from fxfuse.kernels import linear_scale_batchnorm1d as lsb
    from fxfuse.ops.linear_activation_scale import linear_activation_scale
    from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d

    ((m, n, k, dtype),) = args.problem
    x, w = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype)
    bias, scale = torch.randn(n, device="cuda", dtype=dtype), torch.rand(n, device="cuda", dtype=dtype) + 0.5
    rm, rv = torch.zeros(n, device="cuda"), torch.ones(n, device="cuda")
    g, s = torch.ones(n, device="cuda"), torch.zeros(n, device="cuda")
    c = lsb.Columns(bias, scale, None, 1.0, g, s, 1e-5)
    out = torch.empty(m, n, device="cuda", dtype=dtype)
    acc = torch.mm(x, w.T)
    saved = lsb.train_apply(acc, None, c, rm, rv, 0.1, out)
    relu, gelu = las.Act("relu", 0, 0, 1.0, 0.5), las.Act("gelu", 0, 0, 1.0, 1.0)

    def train_kernel():
        made, partials = lsb.train_product(x, w)
        lsb.train_apply(made, partials, c, rm, rv, 0.1, made)

    def train_library():
        made = torch.mm(x, w.T)
        lsb.train_apply(made, None, c, rm, rv, 0.1, made)

    def train_one():
        lsb.train(x, w, c, rm, rv, 0.1, False)

    def train_one_kept():
        lsb.train(x, w, c, rm, rv, 0.1, True)

    more = {"train one kernel": train_one, "train one kernel, kept": train_one_kept} if m <= 1024 else {}
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    dy = torch.randn_like(out)
    parameters = [xg, wg, *(t.clone().requires_grad_() for t in (scale, g, s))]

    def step(op) -> None:
        torch.autograd.grad(op(xg, wg, *parameters[2:]), parameters, dy)

    def op_train(x, w, scale, g, s):
        return linear_scale_batchnorm1d(x, w, bias, scale, None, 1.0, g, s, rm, rv, True)

    def eager_train(x, w, scale, g, s):
        return F.batch_norm(F.linear(x, w, bias) * scale, rm, rv, g, s, True)

    def three_products():
        torch.mm(x, w.T)
        torch.mm(dy, w)
        torch.mm(dy.T, x)

    more |= {
        "three products": three_products,
        "train step op": lambda: step(op_train),
        "train step eager": lambda: step(eager_train),
        "relu op": lambda: linear_activation_scale(x, w, bias, "relu", scale=0.5),
        "train op": lambda: op_train(x, w, scale, g, s),
        "eval op": lambda: linear_scale_batchnorm1d(x, w, bias, scale, None, 1.0, g, s, rm, rv, False),
    }
    return more | {
        "cublas": lambda: torch.mm(x, w.T, out=out),
        "relu kernel": lambda: las.forward(x, w, bias, relu),
        "relu eager": lambda: F.relu(F.linear(x, w, bias)) / 2,
        "gelu kernel": lambda: las.forward(x, w, bias, gelu),
        "eval kernel": lambda: lsb.eval_product(x, w, c, rm, rv, dtype),
        "eval eager": lambda: F.batch_norm(F.linear(x, w, bias) * scale, rm, rv, g, s, False),
        "product+statistics": lambda: lsb.train_product(x, w),
        "train kernel": train_kernel,
        "train library+passes": train_library,
        "train eager": lambda: F.batch_norm(F.linear(x, w, bias) * scale, rm, rv, g, s, True),
        "train pass alone": lambda: lsb.train_apply(acc, None, c, rm, rv, 0.1, out),
        "backward passes": lambda: lsb.backward(out, acc, saved, c, weight=True, shift=True, s=True),
    }


def sweep() -> None:
    """The op against eager over sizes, CPU overhead included: microseconds a call."""
    from torch.nn import functional as F

    from fxfuse.ops.linear_activation_scale import linear_activation_scale
    from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d

    print("us a call: relu op, eager | train op, eager | eval op, eager")
    for dtype in (torch.bfloat16, torch.float32):
        for m, n, k in [
            (8, 512, 512),
            (64, 1024, 1024),
            (256, 2048, 2048),
            (512, 4096, 4096),
            (1024, 1024, 1024),
            (1024, 2048, 4096),
            (2048, 2048, 2048),
            (4096, 1024, 1024),
            (4096, 4096, 1024),
            (65536, 1024, 512),
            (300, 1000, 500),
            (4096, 4001, 1000),
        ]:
            x, w = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype)
            b, v, z = (
                torch.randn(n, device="cuda", dtype=dtype),
                torch.ones(n, device="cuda"),
                torch.zeros(n, device="cuda"),
            )
            calls = {
                "relu": lambda: linear_activation_scale(x, w, b, "relu", scale=0.5),  # noqa: B023
                "relu eager": lambda: F.relu(F.linear(x, w, b)) * 0.5,  # noqa: B023
                "train": lambda: linear_scale_batchnorm1d(x, w, b, b, None, 1.0, v, z, z, v, True),  # noqa: B023
                "train eager": lambda: F.batch_norm(F.linear(x, w, b) * b, z, v, v, z, True),  # noqa: B023
                "eval": lambda: linear_scale_batchnorm1d(x, w, b, b, None, 1.0, v, z, z, v, False),  # noqa: B023
                "eval eager": lambda: F.batch_norm(F.linear(x, w, b) * b, z, v, v, z, False),  # noqa: B023
            }
            with torch.no_grad():
                t = {name: 1e3 * ms for name, ms in interleaved(calls, rounds=5, block_ms=1.5).items()}
            pairs = " | ".join(
                f"{t[q]:8.1f} {t[q + ' eager']:8.1f} {t[q] / t[q + ' eager']:.2f}" for q in ("relu", "train", "eval")
            )
            print(f"{str(dtype)[6:]:9s} {m:6d} {n:5d} {k:5d}  {pairs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", type=int, nargs="*", default=sorted(NAMES))
    parser.add_argument("--bands", type=int, nargs="*", default=[8])
    parser.add_argument("--only", choices=("products", "ops", "sweep"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    if args.only == "sweep":
        return sweep()
    run = None
    if args.only != "ops":
        run = runner(build())
        print("check:", "right" if check(run, args.variants) else "WRONG", flush=True)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for m, n, k in SHAPES:
            args.problem = [(m, n, k, dtype)]
            calls = products(run, args) if run else {}
            if args.only != "products":
                calls.update(ops(args))
            times = interleaved(calls)
            rows.append({"dtype": str(dtype), "shape": [m, n, k], **times})
            print(f"{dtype} {m}x{n}x{k}")
            for name, ms in times.items():
                rate = 2e-9 * m * n * k / ms
                print(
                    f"  {name:22s} {ms:8.4f} ms {rate:7.1f} TFLOP/s  {ms / times['cublas']:.3f} of cublas", flush=True
                )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
