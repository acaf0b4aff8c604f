"""The C functions of kl_div and distillation_kl, called directly, and what eager writes for the same."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the files that import this one, too
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


def offset_copy(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A contiguous copy whose address is `elements` past a 16-byte boundary."""
    flat = torch.empty(x.numel() + 16, dtype=x.dtype, device=x.device)
    return flat[elements : elements + x.numel()].view(x.shape).copy_(x)
