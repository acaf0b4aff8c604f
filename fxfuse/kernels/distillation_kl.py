"""Calls into ``distillation_kl.cu``: the reduced loss of two dense tensors of logits, and its gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels.abi import DOUBLE, DTYPE_CODE, I64, INT, PTR, pointer, stream
from fxfuse.kernels.loader import library

__all__ = ["distillation_kl"]


class _Library(NamedTuple):
    call: Callable[..., None]
    scratch: int  # bytes, whatever the rows
    scratch_per_row: int


@functools.lru_cache(maxsize=1)
def _library() -> _Library:
    found = library()
    assert found is not None, "asked for without kernels"
    ask = found.function("fxfuse_distillation_kl_scratch", [I64, PTR])

    def scratch(rows: int) -> int:
        size = ctypes.c_int64()
        ask(rows, ctypes.addressof(size))
        return size.value

    call = found.function("fxfuse_distillation_kl", [PTR] * 7 + [I64, I64] + [DOUBLE] * 4 + [INT] * 4 + [PTR])
    return _Library(call, scratch(0), scratch(1) - scratch(0))


def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    temperatures: tuple[float, float],
    factor: float,
    scale: float,
    log_target: bool,
    wanted: Sequence[bool] = (),
    grad: Tensor | None = None,
    loss: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The loss (0-d, None unless asked for) and the wanted gradients, times ``grad`` (one element) where it is given.

    ``temperatures`` are the student's and the teacher's, above zero; loss = scale · factor · Σ over rows.
    """
    index, vocab = student.device.index, student.shape[-1]
    rows = student.numel() // vocab
    native = _library()
    out = torch.empty((), dtype=student.dtype, device=student.device) if loss else None
    pairs = zip((student, teacher), wanted or (False, False), strict=True)
    grads = [torch.empty_like(t) if want else None for t, want in pairs]
    scratch = torch.empty(native.scratch + rows * native.scratch_per_row, dtype=torch.uint8, device=student.device)
    if grad is not None:
        grad = grad.to(student.dtype).resolve_neg()
    native.call(
        student.data_ptr(), teacher.data_ptr(), pointer(grad), pointer(out), pointer(grads[0]), pointer(grads[1]),
        scratch.data_ptr(), rows, vocab, *temperatures, factor, scale, log_target, 0, DTYPE_CODE[student.dtype], index,
        stream(index),
    )  # fmt: skip
    return out, grads
