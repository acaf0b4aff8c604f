"""Linear, an activation, and scalar factors before and behind it.

Meaning: scale · act(pre_scale · linear(x, weight, bias)).

Gradients, with z = pre_scale · linear(x, weight, bias), saved when any is wanted, and dz = act'(z) · g:

    dx = c·(dz · W)        dW = c·(dzᵀ · x)        db = c·Σ dz            c = scale · pre_scale

The factor c multiplies the products, where it is free, not the M×N gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.kernels import gemm, small_gemm
from fxfuse.kernels import linear_activation_scale as kernels
from fxfuse.kernels.linear_activation_scale import Act

from . import _activation_step
from ._autocast import cast
from ._kinds import Kinds
from ._op import Op
from ._product import linear_backward, product
from ._road import Road, floating, together
from ._short import Calls, Launch

# activation -> (value, gradient from (g, z), in-place value or None); alpha and beta are its parameters.
_Value = Callable[[Tensor, float, float], Tensor]
_Gradient = Callable[[Tensor, Tensor, float, float], Tensor]
_aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[_Value, _Gradient, _Value | None]] = {
    "relu": (
        lambda z, a, b: torch.relu(z),
        lambda g, z, a, b: _aten.threshold_backward(g, z, 0),
        lambda z, a, b: torch.relu_(z),
    ),
    "gelu": (lambda z, a, b: F.gelu(z), lambda g, z, a, b: _aten.gelu_backward(g, z), None),
    "gelu_tanh": (
        lambda z, a, b: F.gelu(z, approximate="tanh"),
        lambda g, z, a, b: _aten.gelu_backward(g, z, approximate="tanh"),
        None,
    ),
    "silu": (
        lambda z, a, b: F.silu(z),
        lambda g, z, a, b: _aten.silu_backward(g, z),
        lambda z, a, b: F.silu(z, inplace=True),
    ),
    "sigmoid": (
        lambda z, a, b: torch.sigmoid(z),
        lambda g, z, a, b: _aten.sigmoid_backward(g, torch.sigmoid(z)),
        lambda z, a, b: torch.sigmoid_(z),
    ),
    "tanh": (
        lambda z, a, b: torch.tanh(z),
        lambda g, z, a, b: _aten.tanh_backward(g, torch.tanh(z)),
        lambda z, a, b: torch.tanh_(z),
    ),
    "leaky_relu": (
        lambda z, a, b: F.leaky_relu(z, a),
        lambda g, z, a, b: _aten.leaky_relu_backward(g, z, a, False),
        lambda z, a, b: F.leaky_relu(z, a, inplace=True) if a >= 0 else F.leaky_relu(z, a),
    ),
    "hardtanh": (
        lambda z, a, b: F.hardtanh(z, a, b),
        lambda g, z, a, b: _aten.hardtanh_backward(g, z, a, b),
        lambda z, a, b: F.hardtanh_(z, a, b),
    ),
    # As hardtanh, but the gradient passes at the two bounds themselves and stops at NaN.
    "clamp": (
        lambda z, a, b: torch.clamp(z, a, b),
        lambda g, z, a, b: torch.where((z >= a) & (z <= b), g, 0),
        lambda z, a, b: z.clamp_(a, b),
    ),
}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    alpha: float,
    beta: float,
    pre_scale: float,
    scale: float,
) -> Tensor:
    value = _activation(activation)[0]
    z = product(x, weight, bias)
    if pre_scale != 1:
        z = z * pre_scale
    out = value(z, alpha, beta)
    return out if scale == 1 else out * scale


def _activation(name: str) -> tuple[_Value, _Gradient, _Value | None]:
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(ACTIVATIONS)}") from None


def road(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    alpha: float,
    beta: float,
    pre_scale: float,
    scale: float,
) -> Road:
    if x.is_cuda and activation in ACTIVATIONS and _kernels_fit(x, weight, bias):
        return KERNEL_FLOAT32 if gemm.float32_on_tensor_cores(x) else KERNEL
    if activation not in ACTIVATIONS:
        return Road("composed", f"unknown activation {activation!r}")
    if not floating(x, weight, bias) or not together(x, weight, bias):
        return Road("composed", "not floating-point tensors of one device")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return Road("composed", "x, weight and bias differ in dtype")
    if weight.dim() != 2 or x.dim() < 1 or x.size(-1) != weight.size(1):
        return Road("composed", "not x[..., K] and weight[N, K]")
    return CLOSED


def _kernels_fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtype = x.dtype
    return (
        weight.dtype is dtype
        and (bias is None or bias.dtype is dtype)
        and weight.dim() == 2
        and x.dim() >= 1
        and x.size(-1) == weight.size(1)
        and gemm.why_not_kernels(x, weight, bias) is None
    )


KERNEL = Road(
    "kernel",
    "bias, activation and factors in the product's epilogue where it is small, and on Hopper where it is large;"
    " elsewhere, in one pass after it",
)
KERNEL_FLOAT32 = Road("kernel", f"{KERNEL.why}; {gemm.FLOAT32}")
CLOSED = Road("closed", "ATen's product; activation and factors in place")


def forward(
    road: Road,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    alpha: float,
    beta: float,
    pre_scale: float,
    scale: float,
    *,
    wanted: Sequence[bool] = (),
) -> tuple[Tensor, Sequence[Tensor]]:
    if road.name == "kernel":
        return _kernel_forward(x, weight, bias, Act(activation, alpha, beta, pre_scale, scale), any(wanted))
    value, _, in_place = ACTIVATIONS[activation]
    z = F.linear(x, weight, bias)
    if pre_scale != 1:
        z *= pre_scale
    if any(wanted):
        out, saved = value(z, alpha, beta), (z,)
    else:
        out, saved = (in_place or value)(z, alpha, beta), ()  # type: ignore[assignment]
    if scale != 1:
        out *= scale
    return out, saved


def _kernel_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: Act, keep: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Keeps the output where the derivative can be had from it, else the product."""
    output = kernels.from_output(act)
    if (output or not keep) and small_gemm.why_not(x, weight) is None:
        bias = None if bias is None else bias.contiguous()
        out = small_gemm.activation(x, weight, bias, act)(x)
        return out, ((out,) if keep else ())
    if (output or not keep) and gemm.why_not_product(x, weight) is None:
        out = kernels.forward(x, weight, bias, act)
        return out, ((out,) if keep else ())
    z = F.linear(x, weight, bias)
    if not z.is_contiguous():
        z = z.contiguous()
    out = kernels.apply(z, act, z if output or not keep else torch.empty_like(z))
    return out, ((out if output else z,) if keep else ())


def saves(x: Tensor, weight: Tensor, *others: object, wanted: Sequence[bool]) -> Sequence[Tensor]:
    return (F.linear(x, weight),) if any(wanted) else ()


def backward(
    road: Road,
    grad: Tensor,
    saved: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    alpha: float,
    beta: float,
    pre_scale: float,
    scale: float,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    (z,) = saved
    if road.name == "kernel":
        act = Act(activation, alpha, beta, pre_scale, scale)
        sums = bias is not None and wanted[2]
        dz, db = kernels.backward(grad, z, act, kernels.from_output(act), sums)
        return linear_backward(dz, 1.0, x, weight, bias, wanted, db)
    dz = ACTIVATIONS[activation][1](grad, z, alpha, beta)
    return linear_backward(dz, scale * pre_scale, x, weight, bias, wanted)


def autocast(
    device: str, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, *others: object
) -> tuple[object, ...]:
    return cast(dtype, x), cast(dtype, weight), cast(dtype, bias), *others


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, *others: object) -> str:
    if x.is_cuda:
        graph = torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias)
        return gemm.launches_dominate(x, weight, 4) if graph else ""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias):
        return "the product dominates, and ATen's own backward has the least to do around it"
    if x.dim() and x.numel() // max(1, x.size(-1)) * weight.size(0) < 1 << 16:
        return "small"
    return ""


def told(road: Road, x: Tensor, weight: Tensor, *others: object) -> Road:
    graph = torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, *others)
    return SMALL if road.name == "kernel" and not graph and small_gemm.one_launch(x, weight) else road


SMALL = Road("kernel", f"bias, activation and factors in the product's epilogue; {small_gemm.ONE_LAUNCH}")

OP = Op(
    "linear_activation_scale",
    "(Tensor x, Tensor weight, Tensor? bias=None, str activation='relu', float alpha=0., float beta=0.,"
    " float pre_scale=1., float scale=1.) -> Tensor",
    reference,
    road=road,
    forward=forward,
    backward=backward,
    saves=saves,
    autocast=autocast,
    direct=direct,
    told=told,
)


@OP.public
def linear_activation_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    alpha: float = 0.0,
    beta: float = 0.0,
    pre_scale: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """scale · act(pre_scale · linear(x, weight, bias)).

    Args:
        x: [..., K].
        weight: [N, K], as nn.Linear has it.
        bias: [N] or None.
        activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "leaky_relu" (alpha is its slope) or
            "hardtanh" or "clamp" (alpha the minimum, beta the maximum; -inf and inf leave a side open).
        pre_scale, scale: numbers before and behind the activation.

    Returns [..., N] in the dtype of x; in autocast's dtype under autocast.
    Raises ValueError for another activation, and what torch.nn.functional.linear raises for what does not fit.
    """
    out: Tensor
    numbers = (activation, alpha, beta, pre_scale, scale)
    if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling():
        out = OP(x, weight, bias, *numbers)
        return out
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight):
        return _step(x, weight, bias, numbers)
    key, tensors = (id(weight), x.shape), (x, weight, bias)
    launch = CALLS.find(key, tensors, numbers)
    if launch is not None and (kept := launch(x, weight, bias)) is not None:
        return kept
    args = (x, weight, bias, *numbers)
    out = OP(*args)
    if OP.inference(args):
        CALLS.keep(key, tensors, numbers, lambda: _launch(x, weight, bias, Act(*numbers)))
    return out


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[Any, ...]) -> Tensor:
    """A call whose gradient is wanted, by what a call like it came to."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    key = len(tensors), aligned, *numbers, gemm.float32_settings() if x.dtype is torch.float32 else None
    args = (x, weight, bias, *numbers)
    out: Tensor = STEPS.call(
        OP, args, key, *tensors, ordinary=lambda: OP(*args), make=lambda: _activation_step.kind(OP, args)
    )
    return out


CALLS, STEPS = Calls(), Kinds()


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> Launch | None:
    """The call as a launch, where nothing has to be copied for it."""
    if OP.road(x, weight, bias, *act).name != "kernel" or x.numel() == 0 or weight.size(0) == 0:
        return None
    if small_gemm.why_not(x, weight) is None:
        return small_gemm.activation(x, weight, bias, act) if bias is None or bias.is_contiguous() else None
    if gemm.why_not_product(x, weight) is None:
        return small_gemm.large_activation(x, weight, bias, act) if bias is None or bias.is_contiguous() else None
    if not x.is_contiguous():
        return None
    return small_gemm.after_activation(x, weight, bias, act)
