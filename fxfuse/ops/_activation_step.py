"""A training step of `linear_activation_scale` like one before: as _batchnorm_step.py is for the other product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.kernels import linear_activation_scale as kernels
from fxfuse.kernels import small_gemm
from fxfuse.kernels.abi import NOT_SUPPORTED
from fxfuse.kernels.activation_step import TrainingStep
from fxfuse.kernels.loader import KernelError

from ._kinds import Kind, whole
from ._op import Differentiable, Op
from ._product import LinearBackward


class Step:
    """The op for steps like this one, as `Differentiable` takes an op: on matrices past the small products. x and
    weight are on 16 bytes if those given here are. A device that may no longer act as a Hopper goes the ordinary way.
    """

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        x, weight, _, *numbers = args
        self.op = op
        self.tensors, self.kept, self.update = op.tensors, op.kept, op.update
        self.act = kernels.Act(*numbers)
        self.products = LinearBackward(x, weight)
        self.calls = TrainingStep(x, weight, self.act)

    def forward(self, road: Any, *args: Any, wanted: Sequence[bool]) -> tuple[Tensor, Sequence[Tensor]]:
        x, weight, bias = args[:3]
        calls = self.calls
        if not calls.product:
            z = F.linear(x, weight, bias)
            out = kernels.apply(z, self.act, z if calls.output else torch.empty_like(z))
            return out, (out if calls.output else z,)
        try:
            out = calls.forward(x, weight, bias)
        except KernelError as error:
            if error.code != NOT_SUPPORTED:
                raise
            return self.op.forward(road, *args, wanted=wanted)
        return out, (out,)

    def backward(
        self, road: Any, grad: Tensor, saved: list[Tensor], *args: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        x, weight, bias = args[:3]
        sums = bias is not None and wanted[2]
        if grad.data_ptr() % 16 or not grad.is_contiguous():
            dz, db = kernels.backward(grad, saved[0], self.act, self.calls.output, sums)
        else:
            dz, db = self.calls.backward(grad, saved[0], sums)
        return self.products(dz, x, weight, bias, wanted, db)

    def again(self, saved: Sequence[Tensor], *args: Any) -> Any:
        return self.op.again(saved, *args)


def kind(op: Op, args: tuple[Any, ...]) -> Kind:
    """What steps like this one come to: a `Step` where that is all the kernels need to be told, else the whole call."""
    x, weight, bias = args[:3]
    ordinary = whole(op, args)
    if (
        ordinary.direct
        or x.dim() != 2
        or x.numel() == 0
        or weight.size(0) == 0
        or (bias is not None and not bias.is_contiguous())
        or (road := op._road(*args)).name != "kernel"
        or small_gemm.why_not(x, weight) is None
    ):
        return ordinary
    step = Step(op, args)
    return Kind(lambda *args: Differentiable.call(step, road, *args))  # type: ignore[arg-type]
