"""A training step of one kind: its calls into ``linear_scale_batchnorm1d.cu``, with all that does not change from step
to step found once. For the host's sake: where a step is small, its time is what counts."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels import gemm
from fxfuse.kernels import linear_scale_batchnorm1d as kernels
from fxfuse.kernels.abi import DTYPE_CODE, allocator, pointer, stream
from fxfuse.kernels.counters import counters_of

__all__ = ["TrainingStep", "Vectors"]

#: StepKind, StepForward and StepBackward in ``linear_scale_batchnorm1d.cu``: sizes and codes, pointers, numbers.
_KIND, _FORWARD, _BACKWARD = Struct("5q10i"), Struct("16P3d"), Struct("14P2d")


class Vectors(NamedTuple):
    """What a step says about each column: contiguous [N], or None."""

    bias: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class TrainingStep:
    """Steps for x, weight and vectors of the shapes, strides and dtypes of those given here, at any address; x and
    weight on 16 bytes if those given here are.

    one_kernel:  ``train`` may be called; else the product and its passes are the caller's.
    """

    def __init__(self, x: Tensor, weight: Tensor, vectors: Vectors, out_dtype: torch.dtype) -> None:
        (m, k), n, device = x.shape, weight.size(0), x.get_device()
        self.device, self.dtype, self.out_dtype = device, x.dtype, out_dtype
        self.shape, self.strides = (m, n), (n, 1)
        behind = kernels.behind(x, out_dtype)
        self.product = gemm.why_not_product(x, weight, behind) is None
        self.one_kernel = self.product and behind == "training"
        pitches = [0, 0]
        if self.one_kernel:
            a, b = gemm.rows(x), gemm.rows(weight)
            assert a is not None and b is not None
            pitches = [a[1], b[1]]
        partials = -(-m // kernels.PRODUCT_ROWS) * n
        self._scratch, self._maps = (2 * (partials + n),), 8 * partials
        self._counters = kernels.counters_for(n)
        self._pairs = kernels.backward_scratch(m, n, True, x.dtype, out_dtype, device)
        codes = [kernels.vector(t)[1] for t in vectors]
        dtypes = DTYPE_CODE[x.dtype], DTYPE_CODE[out_dtype]
        self._kind = _KIND.pack(m, n, k, *pitches, *codes, gemm.ieee(x), *dtypes, device)

    def train(
        self, x: Tensor, weight: Tensor, vectors: Vectors, alpha: float, eps: float, momentum: float,
        batches: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """(out [M, N], acc [M, N], saved [3, N]), running statistics updated, and one more in ``batches`` (int64).

        None, and nothing done, where the device has no room for all of its blocks at once, or may not act as a Hopper.
        """
        shape, strides, dtype, device = self.shape, self.strides, self.dtype, self.device
        new = allocator(device)
        out, acc = new(shape, strides, dtype), new(shape, strides, dtype)
        saved, scratch = new((3, shape[1]), strides, torch.float32), new(self._scratch, (1,), torch.float32)
        partials, queue = scratch.data_ptr(), stream(device)
        bias, scale, gamma, beta, mean, var = vectors
        step = _FORWARD.pack(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), acc.data_ptr(), partials, partials + self._maps,
            counters_of(x.device, queue, self._counters).data_ptr(), saved.data_ptr(), pointer(batches), pointer(bias),
            pointer(scale), pointer(gamma), pointer(beta), pointer(mean), pointer(var), queue, alpha, eps, momentum,
        )  # fmt: skip
        return (out, acc, saved) if kernels.in_one(kernels.functions().step_forward, self._kind, step) else None

    def backward(
        self, grad: Tensor, acc: Tensor, saved: Tensor, vectors: Vectors, alpha: float, eps: float,
        wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
        """The gradient by acc, and those by bias, scale, weight and shift, where ``wanted`` and given.

        grad: [M, N] in out's dtype, contiguous, on 16 bytes; acc, saved as the forward left them.
        """
        device, one = self.device, self.shape[1:]
        new = allocator(device)
        found = new(self.shape, self.strides, self.dtype)
        scratch = new((2 * self._pairs,), (1,), torch.float32) if self._pairs else None
        bias, scale, gamma, beta = given = vectors[:4]
        d_bias, d_scale, d_gamma, d_beta = by = [
            new(one, (1,), t.dtype) if want and t is not None else None for t, want in zip(given, wanted, strict=True)
        ]
        step = _BACKWARD.pack(
            grad.data_ptr(), acc.data_ptr(), saved.data_ptr(), found.data_ptr(), pointer(scratch), pointer(d_gamma),
            pointer(d_beta), pointer(d_bias), pointer(d_scale), pointer(bias), pointer(scale), pointer(gamma),
            pointer(beta), stream(device), alpha, eps,
        )  # fmt: skip
        kernels.functions().step_backward(self._kind, step)
        return found, by
