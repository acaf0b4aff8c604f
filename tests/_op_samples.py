"""Samples of every op: arguments, and the unfused code a user would have written.

The unfused code is written with torch's own functions and shares nothing with the ops' references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse import ops


@dataclass
class Sample:
    """args: all arguments of the op, in order, in float64. plain: the unfused code. differentiable: argument places."""

    op: str
    label: str
    args: tuple[Any, ...]
    plain: Callable[..., Tensor]
    differentiable: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def fused(self, *args: Any) -> Tensor:
        return ops.get(self.op).call(*args)

    def to(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments in `dtype`, BatchNorm's own tensors in float32 for the half types."""
        half = dtype in (torch.float16, torch.bfloat16)
        return tuple(
            a.to(torch.float32 if half and self.op == "linear_scale_batchnorm1d" and i >= 6 else dtype)
            if isinstance(a, Tensor)
            else a
            for i, a in enumerate(self.args)
        )


def plain_kl_div(input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool) -> Tensor:
    return F.kl_div(torch.log(input) if log_input else input, target, reduction=reduction, log_target=log_target)


def plain_distillation(s, t, dim, ts, tt, scale, red, lt):  # type: ignore[no-untyped-def]
    target = F.log_softmax(t / tt, dim) if lt else F.softmax(t / tt, dim)
    return F.kl_div(F.log_softmax(s / ts, dim), target, reduction=red, log_target=lt) * scale


def plain_matmul_sum(x, weight, bias, scale, dim, keepdim, mean, dtype=None):  # type: ignore[no-untyped-def]
    y = F.linear(x, weight, bias)
    return (torch.mean if mean else torch.sum)(y, dim, keepdim=keepdim, dtype=dtype) * scale


_PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda z, a, b: F.relu(z),
    "gelu": lambda z, a, b: F.gelu(z),
    "gelu_tanh": lambda z, a, b: F.gelu(z, approximate="tanh"),
    "silu": lambda z, a, b: F.silu(z),
    "sigmoid": lambda z, a, b: torch.sigmoid(z),
    "tanh": lambda z, a, b: torch.tanh(z),
    "leaky_relu": lambda z, a, b: F.leaky_relu(z, a),
    "hardtanh": lambda z, a, b: F.hardtanh(z, a, b),
    "clamp": lambda z, a, b: torch.clamp(z, a, b),
}


def plain_activation(x, weight, bias, activation, alpha, beta, pre, scale):  # type: ignore[no-untyped-def]
    return _PLAIN_ACTIVATIONS[activation](F.linear(x, weight, bias) * pre, alpha, beta) * scale


def plain_batchnorm(x, weight, bias, scale, divisor, alpha, g, b, rm, rv, training, momentum, eps):  # type: ignore[no-untyped-def]
    z = F.linear(x, weight, bias) * alpha
    z = z if scale is None else z * scale
    z = z if divisor is None else z / divisor
    return F.batch_norm(z, rm, rv, g, b, training, momentum, eps)


def samples(size: int = 1, seed: int = 0) -> Iterator[Sample]:
    """Every op in every shape of call; `size` multiplies the dimensions."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    m, n, k = 3 * size, 4 * size, 5 * size
    for reduction in ("none", "sum", "mean", "batchmean"):
        for log_target in (False, True):
            for log_input in (False, True):
                p, t = rand(m, n).softmax(-1), rand(m, n).softmax(-1)
                args = (p if log_input else p.log(), t.log() if log_target else t, reduction, log_target, log_input)
                label = f"{reduction}{'-log_target' * log_target}{'-log_input' * log_input}"
                yield Sample("kl_div", label, args, plain_kl_div, (0, 1))
            args = (rand(m, 2, n), rand(m, 2, n), -1, 2.0, 1.5, 4.0, reduction, log_target)
            label = f"{reduction}{'-log_target' * log_target}"
            yield Sample("distillation_kl", label, args, plain_distillation, (0, 1))
    wide = (rand(m, n).log_softmax(-1), rand(n).softmax(-1), "sum", False, False)
    yield Sample("kl_div", "broadcast", wide, plain_kl_div, (0, 1))
    across = (rand(m, n), rand(m, n), 0, 1.0, 1.0, 1.0, "batchmean", False)
    yield Sample("distillation_kl", "dim0", across, plain_distillation, (0, 1))

    for label, x, bias, dim, keepdim, mean in (
        ("sum", rand(m, k), None, -1, False, False),
        ("bias-keepdim", rand(m, k), rand(n), 1, True, False),
        ("mean-batched", rand(2, m, k), rand(n), -1, False, True),
        ("vector", rand(k), rand(n), 0, False, False),
        ("dim0", rand(m, k), rand(n), 0, False, False),
    ):
        args = (x, rand(n, k), bias, 0.5, dim, keepdim, mean, None)
        yield Sample("matmul_div_sum_scale", label, args, plain_matmul_sum, (0, 1) if bias is None else (0, 1, 2))

    for activation in _PLAIN_ACTIVATIONS:
        alpha, beta = {"leaky_relu": (0.1, 0.0), "hardtanh": (-0.5, 0.7), "clamp": (-0.5, float("inf"))}.get(
            activation, (0.0, 0.0)
        )
        args = (rand(m, k), rand(n, k), rand(n), activation, alpha, beta, 1.5, 0.25)
        yield Sample("linear_activation_scale", activation, args, plain_activation, (0, 1, 2))
    args = (rand(2, m, k), rand(n, k), None, "silu", 0.0, 0.0, 1.0, 1.0)
    yield Sample("linear_activation_scale", "batched-plain", args, plain_activation, (0, 1))

    for training in (True, False):
        for label, bias, scale, divisor, alpha, g, b in (
            ("full", rand(n), rand(n), rand(n).exp(), 0.5, rand(n), rand(n)),
            ("bare", None, None, None, 1.0, None, None),
            ("row-scale", rand(n), rand(1, n), None, 1.0, rand(n), rand(n)),
            ("one-divisor", None, None, rand(1).exp(), 2.0, rand(n), None),
            ("rows", None, rand(m, 1), None, 1.0, rand(n), rand(n)),
        ):
            statistics = (rand(n), rand(n).exp(), training, 0.3, 1e-3)
            args = (rand(m, k), rand(n, k), bias, scale, divisor, alpha, g, b, *statistics)
            label = f"{label}-{'train' if training else 'eval'}"
            places = tuple(i for i in range(8) if isinstance(args[i], Tensor))
            yield Sample("linear_scale_batchnorm1d", label, args, plain_batchnorm, places)


SMALL = list(samples())
EVERY = pytest.mark.parametrize("sample", SMALL, ids=str)
NAMES = pytest.mark.parametrize("name", ops.names())


def copies(args: tuple[Any, ...], grads: tuple[int, ...] = ()) -> tuple[Any, ...]:
    return tuple(a.clone().requires_grad_(i in grads) if isinstance(a, Tensor) else a for i, a in enumerate(args))


def first_of(op: str, label: str = "") -> Sample:
    return next(s for s in SMALL if s.op == op and s.label.startswith(label))
