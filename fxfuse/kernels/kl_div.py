"""Calls into ``kl_div.cu``: the loss of two dense tensors of one shape and dtype, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfuse.kernels.abi import DOUBLE, DTYPE_CODE, I64, INT, PTR, allocate, pointer, stream
from fxfuse.kernels.loader import library

__all__ = ["PARTIALS", "backward", "forward", "kept_forward"]

#: doubles of scratch for a reduction, kMaxPartials of finish.cuh
PARTIALS = 4096


@functools.lru_cache(maxsize=1)
def _functions() -> tuple[Callable[..., None], Callable[..., None]]:
    found = library()
    assert found is not None, "asked for without kernels"
    return (
        found.function("fxfuse_kl_div_forward", [PTR] * 6 + [I64, DOUBLE] + [INT] * 5 + [PTR]),
        found.function("fxfuse_kl_div_backward", [PTR] * 5 + [I64, DOUBLE] + [INT] * 5 + [PTR]),
    )


def forward(
    input: Tensor,
    target: Tensor,
    reduce: bool,
    factor: float,
    log_target: bool,
    log_input: bool,
    wanted: Sequence[bool] = (),
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss (0-d: ``factor`` times the sum, or elementwise), and with ``reduce`` the wanted gradients of it."""
    index = input.device.index
    if not reduce:
        out = torch.empty_like(input)
        _functions()[0](
            input.data_ptr(), target.data_ptr(), out.data_ptr(), 0, 0, 0, input.numel(), factor, False,
            log_target, log_input, DTYPE_CODE[input.dtype], index, stream(index),
        )  # fmt: skip
        return out, [None, None]
    out = torch.empty((), dtype=input.dtype, device=input.device)
    scratch = torch.empty(PARTIALS, dtype=torch.float64, device=input.device)
    pairs = zip((input, target), wanted or (False, False), strict=True)
    grads = [torch.empty_like(t) if want else None for t, want in pairs]
    _functions()[0](
        input.data_ptr(), target.data_ptr(), out.data_ptr(), pointer(grads[0]), pointer(grads[1]), scratch.data_ptr(),
        input.numel(), factor, True, log_target, log_input, DTYPE_CODE[input.dtype], index, stream(index),
    )  # fmt: skip
    return out, grads


def kept_forward(
    input: Tensor, reduce: bool, factor: float, log_target: bool, log_input: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """``forward`` without gradients as a function of two tensors, for those of ``input``'s shape, dtype and device."""
    function, (count, dtype, index) = _functions()[0], (input.numel(), input.dtype, input.device.index)
    shape = () if reduce else tuple(input.shape)
    strides = () if reduce else input.stride()
    code = DTYPE_CODE[dtype]

    def run(input: Tensor, target: Tensor) -> Tensor:
        out = allocate(shape, strides, dtype, index)
        scratch = allocate((PARTIALS,), (1,), torch.float64, index) if reduce else None
        function(
            input.data_ptr(), target.data_ptr(), out.data_ptr(), 0, 0, pointer(scratch), count, factor, reduce,
            log_target, log_input, code, index, stream(index),
        )  # fmt: skip
        return out

    return run


def backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    factor: float,
    log_target: bool,
    log_input: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients for an incoming gradient of one element (any expanded view of one, too) or of every one."""
    index = input.device.index
    whole = any(grad.stride())  # an expanded element is read as one
    grad = (grad.contiguous() if whole else grad).to(input.dtype).resolve_neg()
    grads = [torch.empty_like(t) if want else None for t, want in zip((input, target), wanted, strict=True)]
    _functions()[1](
        grad.data_ptr(), input.data_ptr(), target.data_ptr(), pointer(grads[0]), pointer(grads[1]), input.numel(),
        factor, whole, log_target, log_input, DTYPE_CODE[input.dtype], index, stream(index),
    )  # fmt: skip
    return grads
