"""Gradients written by a forward pass, times the gradient that came in: nothing is read or written where that is 1."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfuse.kernels.abi import DTYPE_CODE, I64, INT, PTR, pointer, stream
from fxfuse.kernels.loader import library

__all__ = ["capable", "scale_unless_one", "why_not"]


@functools.lru_cache(maxsize=1)
def _function() -> Callable[..., None]:
    found = library()
    assert found is not None, "asked for without kernels"
    return found.function("fxfuse_scale_unless_one", [PTR, PTR, I64, PTR, I64, INT, INT, PTR])


def scale_unless_one(factor: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Multiply up to two dense tensors in place by ``factor`` (one element, same dtype), decided on the device."""
    some = [g for g in grads if g is not None]
    if not some:
        return
    first, second = some[0], some[1] if len(some) > 1 else None
    index = first.device.index
    _function()(
        pointer(factor), pointer(first), first.numel(), pointer(second), 0 if second is None else second.numel(),
        DTYPE_CODE[first.dtype], index, stream(index),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def capable(index: int | None) -> bool:
    """Whether the device runs the kernels: compute capability 8.0 or newer."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def why_not(first: Tensor, second: Tensor) -> str | None:
    """The reason why the loss kernels do not take two tensors of one shape; None when they do."""
    if first.device.type != "cuda" or second.device != first.device:
        return f"no kernel for {first.device.type}" if first.device == second.device else "not on one device"
    if first.dtype not in DTYPE_CODE or second.dtype != first.dtype:
        return f"no kernel for {first.dtype} with {second.dtype}"
    if first.is_neg() or second.is_neg():
        return "a pending negation"
    if not torch.cuda.is_initialized():  # fake tensors on a machine that has not touched CUDA
        return "CUDA is not in use"
    if not capable(first.device.index):
        return "a GPU of compute capability below 8.0"
    return None if library() is not None else "the CUDA kernels are not there"
