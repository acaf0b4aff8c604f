"""Calls into ``linear_activation_scale.cu``: scale * act(pre_scale * (x W^T + b)) and its elementwise passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels import gemm
from fxfuse.kernels.abi import DTYPE_CODE, FLOAT, I64, INT, PTR, pointer, stream
from fxfuse.kernels.loader import library

__all__ = ["ACTIVATION_CODE", "Act", "apply", "backward", "forward", "from_output"]

_NAME = "fxfuse_linear_activation_scale_"

#: Name -> code of ``enum Activation`` in ``activation.cuh``.
ACTIVATION_CODE = {
    name: code
    for code, name in enumerate(
        ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "leaky_relu", "hardtanh", "clamp")
    )
}


class Act(NamedTuple):
    """An activation with its numbers and the factors before and behind it."""

    activation: str
    alpha: float
    beta: float
    pre_scale: float
    scale: float

    def arguments(self) -> tuple[int, float, float, float, float]:
        return ACTIVATION_CODE[self.activation], self.alpha, self.beta, self.pre_scale, self.scale


class _Functions(NamedTuple):
    forward: Callable[..., None]
    apply: Callable[..., None]
    backward: Callable[..., None]


@functools.lru_cache(maxsize=1)
def _functions() -> _Functions:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    act = [INT, FLOAT, FLOAT, FLOAT, FLOAT]
    end = [INT, INT, PTR]
    return _Functions(
        found.function(_NAME + "forward", [PTR, PTR, PTR, PTR, I64, I64, I64, I64, I64, *act, INT, *end]),
        found.function(_NAME + "apply", [PTR, PTR, I64, *act, *end]),
        found.function(_NAME + "backward", [PTR, PTR, PTR, I64, INT, *act, *end]),
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> Tensor:
    """The op in one kernel: out [..., N] for x [..., K], weight [N, K], bias [N]; asks ``gemm.why_not_product``
    to be None."""
    a, b = gemm.rows(x), gemm.rows(weight)
    assert a is not None and b is not None
    out = torch.empty(*x.shape[:-1], weight.size(0), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    device = x.device.index
    _functions().forward(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.contiguous().data_ptr(), out.data_ptr(),
        a[0].size(0), weight.size(0), weight.size(1), a[1], b[1], *act.arguments(), gemm.ieee(x),
        DTYPE_CODE[x.dtype], device, stream(device),
    )  # fmt: skip
    return out


def apply(z: Tensor, act: Act, out: Tensor) -> Tensor:
    """out = scale * act(pre_scale * z), elementwise; contiguous, 16-byte aligned, of one dtype. out may be z."""
    device = z.device.index
    _functions().apply(
        z.data_ptr(), out.data_ptr(), z.numel(), *act.arguments(), DTYPE_CODE[z.dtype], device, stream(device)
    )
    return out


def from_output(act: Act) -> bool:
    """Whether the derivative can be had from the op's output, so that z need not be kept. Not where the factor behind
    the activation could push outputs out of a 16-bit type's range."""
    if not 1e-3 <= abs(act.scale) <= 1e3:
        return False
    return act.activation in ("relu", "sigmoid", "tanh") or (act.activation == "leaky_relu" and act.alpha >= 0)


def backward(grad: Tensor, saved: Tensor, act: Act, output: bool) -> Tensor:
    """d z (contiguous) for the gradient of out; ``saved`` is z, or with ``output`` out itself. One dtype and shape."""
    grad = grad.contiguous()
    if grad.data_ptr() % 16:
        grad = grad.clone()
    dz = torch.empty_like(grad)
    device = grad.device.index
    _functions().backward(
        pointer(grad), pointer(saved), pointer(dz), grad.numel(), int(output), *act.arguments(),
        DTYPE_CODE[grad.dtype], device, stream(device),
    )  # fmt: skip
    return dz
