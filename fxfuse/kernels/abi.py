"""The Python side of the kernels' C interface: dtype codes, argument types, pointers and streams.

A kernel returns 0 or a CUDA error code, takes raw pointers, 64-bit sizes, plain scalars, a dtype code, a device index
and a stream, in that order. ``common.cuh`` is the C side of the same conventions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

__all__ = [
    "DOUBLE",
    "DTYPE_CODE",
    "FLOAT",
    "I64",
    "INT",
    "NOT_SUPPORTED",
    "PTR",
    "aligned",
    "allocate",
    "allocator",
    "any_other_layout",
    "pointer",
    "stream",
]

#: dtype -> code of ``enum DType`` in ``common.cuh``. A dtype that is missing has no kernel.
DTYPE_CODE: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: cudaErrorNotSupported. A kept call gives it where FXFUSE_PORTABLE was set since.
NOT_SUPPORTED = 801

PTR = ctypes.c_void_p
I64 = ctypes.c_int64
INT = ctypes.c_int
FLOAT = ctypes.c_float
DOUBLE = ctypes.c_double


def any_other_layout(*tensors: torch.Tensor | None) -> bool:
    """Whether a tensor can't be read through its pointer as it is: not strided, or with a negation pending."""
    for t in tensors:  # noqa: SIM110 (any() takes twice as long)
        if t is not None and (t.layout is not torch.strided or t.is_neg()):
            return True
    return False


def aligned(t: torch.Tensor) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes. One that a trace stands in for has no address, and is taken
    for one that does."""
    plain = type(t) is torch.Tensor or type(t) is torch.nn.Parameter
    return (not plain and isinstance(t, (FakeTensor, FunctionalTensor))) or t.data_ptr() % 16 == 0


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device_index: int) -> int:
    """The raw handle of the device's current stream, as torch sees it."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: int) -> Tensor:
    """An uninitialised tensor; by the way of Inductor's own code, at a third of the cost, on the current device."""
    return allocator(device)(shape, strides, dtype)


def allocator(device: int) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """``allocate`` for several tensors in a row, as a function of shape, strides and dtype."""
    if _empty_strided is not None and _current_device() == device:
        return _empty_strided
    return lambda shape, strides, dtype: torch.empty(shape, dtype=dtype, device=torch.device("cuda", device))


_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_empty_strided: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
