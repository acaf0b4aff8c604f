"""Calls into ``distillation_elements.cu``: the distillation loss of every element, and its gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfuse.kernels.abi import DOUBLE, DTYPE_CODE, I64, INT, PTR, pointer, stream
from fxfuse.kernels.loader import library

__all__ = ["backward", "forward"]


@functools.lru_cache(maxsize=1)
def _function() -> Callable[..., None]:
    found = library()
    assert found is not None, "asked for without kernels"
    return found.function("fxfuse_distillation_elements", [PTR] * 7 + [I64, I64] + [DOUBLE] * 3 + [INT] * 4 + [PTR])


@functools.lru_cache(maxsize=64)
def _scratch(device: int) -> int:
    """Bytes, whatever the shape."""
    found = library()
    assert found is not None, "asked for without kernels"
    size = ctypes.c_int64()
    found.function("fxfuse_distillation_elements_scratch", [INT, PTR])(device, ctypes.addressof(size))
    return size.value


def forward(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, float], scale: float, log_target: bool
) -> Tensor:
    """scale · KL of every element, of the logits' shape; ``temperatures`` (student's, teacher's) are above zero."""
    index, vocab = student.device.index, student.shape[-1]
    out = torch.empty_like(student)
    scratch = torch.empty(_scratch(index), dtype=torch.uint8, device=student.device)
    _function()(
        student.data_ptr(), teacher.data_ptr(), 0, out.data_ptr(), 0, 0, scratch.data_ptr(),
        student.numel() // vocab, vocab, *temperatures, scale, False, log_target, DTYPE_CODE[student.dtype], index,
        stream(index),
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperatures: tuple[float, float],
    scale: float,
    log_target: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients for an incoming gradient of every element, or any expanded view of one."""
    index, vocab = student.device.index, student.shape[-1]
    grads = [torch.empty_like(t) if want else None for t, want in zip((student, teacher), wanted, strict=True)]
    whole = any(grad.stride())  # an expanded element is read as one
    if whole:
        grad = grad.contiguous()
    grad = grad.to(student.dtype).resolve_neg()
    scratch = torch.empty(_scratch(index), dtype=torch.uint8, device=student.device)
    _function()(
        student.data_ptr(), teacher.data_ptr(), grad.data_ptr(), 0, pointer(grads[0]), pointer(grads[1]),
        scratch.data_ptr(), student.numel() // vocab, vocab, *temperatures, scale, whole, log_target,
        DTYPE_CODE[student.dtype], index, stream(index),
    )  # fmt: skip
    return grads
