"""A training step of one kind: its calls into ``linear_activation_scale.cu``, with all that does not change from step
to step found once. For the host's sake: where a step is small, its time is what counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfuse.kernels import gemm
from fxfuse.kernels import linear_activation_scale as kernels
from fxfuse.kernels.abi import DTYPE_CODE, FLOAT, I64, INT, allocator, pointer, stream
from fxfuse.kernels.counters import counters_of

__all__ = ["TrainingStep"]


class TrainingStep:
    """Steps for x [M, K] and weight [N, K] of the shapes, strides and dtypes of those given here, at any address; on 16
    bytes if those given here are.

    output:  whether the gradient is had from the op's output, so that z need not be kept.
    product: ``forward`` may be called; else the product and its pass are the caller's.
    """

    def __init__(self, x: Tensor, weight: Tensor, act: kernels.Act) -> None:
        (m, k), n, device, dtype = x.shape, weight.size(0), x.get_device(), x.dtype
        self.device, self.dtype, self.shape, self.strides = device, dtype, (m, n), (n, 1)
        self.output = kernels.from_output(act)
        self.product = self.output and gemm.why_not_product(x, weight) is None
        # as C takes them: ctypes need not turn them into that at each call
        code, *factors = act.arguments()
        numbers, end = (INT(code), *map(FLOAT, factors)), (INT(DTYPE_CODE[dtype]), INT(device))
        if self.product:
            a, b = gemm.rows(x), gemm.rows(weight)
            assert a is not None and b is not None
            self._forward = *map(I64, (m, n, k, a[1], b[1])), *numbers, INT(gemm.ieee(x)), *end
        self._sums = n * dtype.itemsize % 16 == 0
        self._floats, self._ints = kernels.backward_scratch(m, n, dtype, device) if self._sums else (0, 0)
        self._backward = I64(m), I64(n), INT(self.output), *numbers, *end

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The op in one kernel: out [M, N]; bias contiguous [N]."""
        device = self.device
        out = allocator(device)(self.shape, self.strides, self.dtype)
        kernels.functions().forward(
            x.data_ptr(), weight.data_ptr(), pointer(bias), out.data_ptr(), *self._forward, stream(device)
        )
        return out

    def backward(self, grad: Tensor, saved: Tensor, column_sums: bool) -> tuple[Tensor, Tensor | None]:
        """``kernels.backward`` for a gradient [M, N], contiguous and on 16 bytes."""
        device, dtype, one = self.device, self.dtype, (1,)
        new, queue = allocator(device), stream(device)
        dz = new(self.shape, self.strides, dtype)
        db = scratch = counters = None
        if column_sums and self._sums:
            db = new(self.shape[1:], one, dtype)
            if self._floats:
                scratch = new((self._floats,), one, torch.float32)
                counters = counters_of(grad.device, queue, self._ints)
        kernels.functions().backward(
            grad.data_ptr(), saved.data_ptr(), dz.data_ptr(), pointer(db), pointer(scratch), pointer(counters),
            *self._backward, queue,
        )  # fmt: skip
        return dz, db
