"""What the CUDA tests of products share: dtypes, activations, random data, and errors against float64."""

from __future__ import annotations

import math

import draws
import torch
from uninitialised import fill_with_nan

from fxfuse.kernels import linear_activation_scale as las
from fxfuse.kernels import loader

#: dtypes, and float32 with TF32 allowed
KINDS = ["bfloat16", "float16", "tf32", "float32"]
ACTS = [
    las.Act("relu", 0, 0, 1.0, 0.5),
    las.Act("gelu", 0, 0, 0.7, 1.0),
    las.Act("gelu_tanh", 0, 0, 1.0, -2.0),
    las.Act("silu", 0, 0, 1.5, 1.0),
    las.Act("sigmoid", 0, 0, 1.0, 3.0),
    las.Act("tanh", 0, 0, 0.3, 1.0),
    las.Act("leaky_relu", 0.2, 0, -1.0, 0.5),
    las.Act("hardtanh", -0.5, 1.0, 1.0, 0.25),
    las.Act("clamp", -math.inf, 1.0, 1.0, 1.0),
]


#: How A [M, K] and B [K, N] lie in memory: x Wᵀ, dY W, dYᵀ X.
LAYOUTS = ("forward", "d_input", "d_weight")


def lay(a: torch.Tensor, b: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same matrices; rows in memory a multiple of 16 bytes apart, with NaN between them."""
    left, right = (a.t() if layout == "d_weight" else a), (b.t() if layout == "forward" else b)
    left, right = padded(left), padded(right)
    return (left.t() if layout == "d_weight" else left), (right.t() if layout == "forward" else right)


def padded(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    unit = 16 // matrix.element_size()
    memory = torch.full((rows, -(-columns // unit) * unit + unit), math.nan, dtype=matrix.dtype, device=matrix.device)
    memory[:, :columns] = matrix
    return memory[:, :columns]


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind == "tf32" else getattr(torch, kind)


def randn(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


#: Errors beside the result's norm that nobody is asked to be under, so that eager's luck does not decide: less than
#: rounding to 16 bits costs; three or four units of float32's last place, as sums of thousands come out in any order;
#: in TF32, whose operands eager's small products may keep whole, somewhat more than rounding both.
LEAST = {torch.float32: 4e-7, torch.float16: 8e-5, torch.bfloat16: 4e-4}
LEAST_TF32 = 4e-4


class Errors:
    """Norm-wise errors over many draws, so that a small product's luck does not decide."""

    def __init__(self):
        self.sums = {}

    def add(self, what, got, eager, want, least=0.0):
        assert got.dtype == eager.dtype and got.shape == eager.shape and got.stride() == eager.stride(), what
        new = float((got.double() - want).square().sum()), float((eager.double() - want).square().sum())
        size = float(want.double().square().sum())
        self.sums[what] = [a + b for a, b in zip(self.sums.get(what, (0, 0, 0)), (*new, least**2 * size), strict=True)]

    def check(self):
        for what, (mine, eagers, least) in self.sums.items():
            assert draws.under_a_tool or mine**0.5 <= 1.25 * max(eagers, least) ** 0.5, (
                f"{what}: {mine**0.5:.3g} against eager's {eagers**0.5:.3g}"
            )


def poison(request, monkeypatch):
    """Until the test ends every result's memory is full of NaN before the kernel writes: an element that it forgets
    shows. TF32 is allowed where the test's ``kind`` says so."""
    assert loader.library() is not None, loader.why_unavailable()
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    fill_with_nan(monkeypatch)
