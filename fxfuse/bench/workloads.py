"""The computations that are measured: small models as people write them, and the sizes they are measured at.

A workload also knows the least work any implementation must do (`Work`: bytes moved, operations), from which
`limits` derives the time no implementation can beat. "Least" counts every input read once, every output written
once, and only the matrix products that no algebra removes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
DISTILLATION_TEMPERATURE = 2.0


class LinearScaleBatchNorm(nn.Module):
    """x[M, K] -> BatchNorm1d(Linear(x) · scale)[M, N], scale a per-channel parameter."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)
        self.scale = nn.Parameter(torch.empty(n).uniform_(0.5, 1.5))
        self.bn = nn.BatchNorm1d(n)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x) * self.scale)


class MatmulDivSumScale(nn.Module):
    """x[M, K] -> 1.5 · Σⱼ (x Wᵀ / 2)ᵢⱼ as [M, 1]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k).uniform_(-(k**-0.5), k**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight.T) / 2
        return torch.sum(y, dim=1, keepdim=True) * 1.5


class LinearReLUDivide(nn.Module):
    """x[M, K] -> relu(Linear(x)) / 2 as [M, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) / 2


class KLDiv(nn.Module):
    """Probabilities p[M, N], targets t[M, N] -> kl_div(log p, t, "batchmean"), a scalar."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(torch.log(p), t, reduction="batchmean")


class Distillation(nn.Module):
    """Student and teacher logits [M, N] -> kl_div(log_softmax(s/T), softmax(t/T), "batchmean") · T², a scalar."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = DISTILLATION_TEMPERATURE
        log_q = F.log_softmax(student / t, dim=-1)
        p = F.softmax(teacher / t, dim=-1)
        return F.kl_div(log_q, p, reduction="batchmean") * (t * t)


@dataclass(frozen=True)
class Work:
    """The least an implementation must do: bytes through device memory, operations in matrix products."""

    bytes: int
    matrix_ops: int


@dataclass(frozen=True)
class Workload:
    """One computation. `sizes[device type]` are the shapes measured by default, M,N,K or M,N (as `dims` names them)."""

    name: str
    title: str
    short: str
    formula: str
    dims: str
    build: Callable[[Shape], nn.Module]
    inputs: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    work: Callable[[Shape, int, bool], Work]  # shape, bytes of an element, with the backward?
    sizes: dict[str, list[Shape]]
    differentiable_inputs: tuple[int, ...] = (0,)
    training: bool = True
    modes: tuple[str, ...] = ("fwd", "fwdbwd")

    @property
    def has_product(self) -> bool:
        return self.dims == "M,N,K"


def _product_input(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    m, _, k = shape
    return (torch.randn(m, k, generator=generator, device=generator.device),)


def _probabilities(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    def one() -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).softmax(-1)

    return one(), one()


def _logits(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, generator=generator, device=generator.device).mul_(2) for _ in range(2))


def _product_work(shape: Shape, itemsize: int, backward: bool) -> Work:
    """y = xWᵀ; backward: dx = dy W and dW = dyᵀ x, two more products of the same size."""
    m, n, k = shape
    moved = m * k + n * k + m * n
    return Work((2 if backward else 1) * moved * itemsize, (3 if backward else 1) * 2 * m * n * k)


def _collapsed_work(shape: Shape, itemsize: int, backward: bool) -> Work:
    """x · ΣⱼWⱼ reads x and W once; backward: dx is rank one and dW one row repeated, each written once."""
    m, n, k = shape
    return Work((2 if backward else 1) * (m * k + n * k) * itemsize, 0)


def _divergence_work(shape: Shape, itemsize: int, backward: bool) -> Work:
    """Both arguments read once; the gradient of the first written in the same pass."""
    m, n = shape
    return Work((3 if backward else 2) * m * n * itemsize, 0)


_GPU_PRODUCT: Shape = (1024, 8192, 8192)

WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload(
            name="linear_scale_batchnorm1d_train",
            title="Linear–scale–BatchNorm, train",
            short="Linear-scale-BN",
            formula="bn(linear(x) * scale)",
            dims="M,N,K",
            build=lambda s: LinearScaleBatchNorm(s[2], s[1]),
            inputs=_product_input,
            work=_product_work,
            sizes={"cuda": [_GPU_PRODUCT, (16384, 4096, 4096)], "cpu": [(1024, 1024, 1024)]},
        ),
        Workload(
            name="linear_scale_batchnorm1d_eval",
            title="Linear–scale–BatchNorm, eval",
            short="Linear-scale-BN",
            formula="bn(linear(x) * scale)",
            dims="M,N,K",
            build=lambda s: LinearScaleBatchNorm(s[2], s[1]),
            inputs=_product_input,
            work=_product_work,
            sizes={"cuda": [_GPU_PRODUCT], "cpu": [(1024, 1024, 1024)]},
            training=False,
            modes=("fwd",),
        ),
        Workload(
            name="matmul_div_sum_scale",
            title="matmul–divide–sum–scale",
            short="matmul-sum",
            formula="sum(x @ W.T / 2, dim=1, keepdim=True) * 1.5",
            dims="M,N,K",
            build=lambda s: MatmulDivSumScale(s[2], s[1]),
            inputs=_product_input,
            work=_collapsed_work,
            sizes={"cuda": [_GPU_PRODUCT], "cpu": [_GPU_PRODUCT]},
        ),
        Workload(
            name="linear_activation_scale",
            title="Linear–ReLU–divide",
            short="Linear-ReLU",
            formula="relu(linear(x)) / 2",
            dims="M,N,K",
            build=lambda s: LinearReLUDivide(s[2], s[1]),
            inputs=_product_input,
            work=_product_work,
            sizes={"cuda": [_GPU_PRODUCT], "cpu": [(1024, 1024, 1024)]},
        ),
        Workload(
            name="kl_div",
            title="KL divergence",
            short="KL",
            formula='kl_div(log(p), t, reduction="batchmean")',
            dims="M,N",
            build=lambda s: KLDiv(),
            inputs=_probabilities,
            work=_divergence_work,
            sizes={"cuda": [(16384, 16384)], "cpu": [(4096, 4096)]},
        ),
        Workload(
            name="distillation_kl",
            title="distillation KL, T = 2",
            short="distill.",
            formula='kl_div(log_softmax(s/T), softmax(t/T), "batchmean") * T²',
            dims="M,N",
            build=lambda s: Distillation(),
            inputs=_logits,
            work=_divergence_work,
            sizes={"cuda": [(4096, 128256)], "cpu": [(512, 32000)]},
        ),
    )
}
