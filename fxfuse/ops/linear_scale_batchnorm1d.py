"""Linear, per-column factors, and BatchNorm1d over the batch.

Meaning: batch_norm(alpha · linear(x, weight, bias) · scale / divisor, ...), the running statistics updated by PyTorch's
rules (momentum, unbiased variance).

With y = linear(x, weight, bias), s = alpha·scale/divisor (one number a column), and in training the column mean m and
biased variance of y, r = 1/√(s²·var + ε):

    training    out = γ·s·r·(y − m) + β                running mean ← s·m, running variance ← s²·var·M/(M−1)
    eval        out = γ·r·(s·y − μ) + β                μ, r of the running statistics

Gradients for dz = upstream, B = Σ dz, P = Σ dz·(y − m) over the batch:

    training    dy = γ·s·r·(dz − B/M − (y − m)·s²·r²·P/M)
                dγ = s·r·P        dβ = B        ds = γ·ε·r³·P        d bias = 0, exactly
    eval        dy = γ·r·s·dz
                dγ = r·(s·Σ dz·y − μ·B)        dβ = B        ds = γ·r·Σ dz·y

then d scale = ds·alpha/divisor, d divisor = −ds·s/divisor, and the product's own gradients from dy. What is saved is y
(one M×N tensor, in the product's dtype) and two vectors. The bias cancels in training: eager's gradient for it is
rounding noise around zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from fxfuse.kernels import gemm, small_gemm
from fxfuse.kernels import linear_scale_batchnorm1d as kernels
from fxfuse.kernels.abi import DTYPE_CODE

from . import _batchnorm_closed as closed
from . import _batchnorm_step
from ._autocast import cast
from ._batchnorm import (
    FEW_ROWS,
    behind,
    buffer,
    columns,
    factors,
    gradients,
    kernel_evaluation,
    kernel_gradients,
    kernel_training,
    mode,
    one_launch,
    one_pass,
    per_column,
    product_has_bias,
    scaled_dtype,
)
from ._kinds import Kinds
from ._op import Op
from ._product import product
from ._road import Road, floating, together, wide
from ._short import Calls, Launch


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    update: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    z = product(x, weight, bias)
    if alpha != 1:
        z = z * alpha
    if scale is not None:
        z = z * scale
    if divisor is not None:
        z = z / divisor
    if training and not update:
        running_mean = None if running_mean is None else running_mean.clone()
        running_var = None if running_var is None else running_var.clone()
    out = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if update:
        return out, None, None
    return out, buffer(running_mean, x, training), buffer(running_var, x, training)


def road(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Road:
    tensors = (x, weight, bias, scale, divisor, bn_weight, bn_bias, running_mean, running_var)
    if x.is_cuda and _kernels_fit(tensors, training, eps):
        return KERNEL_FLOAT32 if gemm.float32_on_tensor_cores(x) else KERNEL
    if not floating(*tensors) or not together(*tensors):
        return Road("composed", "not floating-point tensors of one device")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return Road("composed", "x, weight and bias differ in dtype")
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1):
        return Road("composed", "not x[M, K] and weight[N, K]")
    if x.size(0) <= 1 or weight.size(0) == 0 or eps < 0 or (training and eps <= 0):
        return Road("composed", "a batch, width or eps that eager has a word about")
    features = weight.shape[:1]
    if any(t is not None and t.shape != features for t in (bias, bn_weight, bn_bias, running_mean, running_var)):
        return Road("composed", "the shapes do not fit")
    if not (per_column(scale, features[0]) and per_column(divisor, features[0])):
        return Road("composed", "scale or divisor is not one number a column")
    norm = {t.dtype for t in (bn_weight, bn_bias, running_mean, running_var) if t is not None}
    if norm - {wide(scaled_dtype(x, scale, divisor))}:
        return Road("composed", "BatchNorm's tensors are not float32 (float64 for float64)")
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return Road("composed", "running statistics are missing")
    if training:
        return Road("composed", f"no kernel for {x.device.type}: ATen's batch_norm is the shortest in training")
    return CLOSED


KERNEL = Road(
    "kernel",
    "scale and BatchNorm in the product's epilogue where it is small, and on Hopper where it is large and that pays;"
    " else in one or two passes after it",
)
KERNEL_FLOAT32 = Road("kernel", f"{KERNEL.why}; {gemm.FLOAT32}")
CLOSED = Road("closed", "ATen's product, then one multiply-add in place")


def _kernels_fit(tensors: tuple[Any, ...], training: bool, eps: float) -> bool:
    """The short way through the questions of `road`, for what the kernels take."""
    x, weight, bias, scale, divisor, bn_weight, bn_bias, running_mean, running_var = tensors
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.dtype is not weight.dtype
        or (bias is not None and bias.dtype is not x.dtype)
    ):
        return False
    (rows, k), (n, k2) = x.shape, weight.shape
    if rows < (2 if training else 1) or n == 0 or k != k2 or eps < 0 or (training and eps <= 0):
        return False
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return False
    given = scaled_dtype(x, scale, divisor)
    norm = torch.float32 if bn_weight is None or bn_weight.dtype is not given or n == 1 else given
    for t in (bn_weight, bn_bias, running_mean, running_var):
        if t is not None and (t.dtype is not norm or t.dim() != 1 or t.size(0) != n):
            return False
    if bias is not None and (bias.dim() != 1 or bias.size(0) != n):
        return False
    for t in (scale, divisor):
        if t is not None and (t.dtype not in DTYPE_CODE or not per_column(t, n)):
            return False
    if given is not x.dtype and given is not torch.float32:
        return False
    return gemm.why_not_kernels(*tensors) is None


def forward(
    road: Road,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    wanted: Sequence[bool] = (),
    update: bool = False,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Sequence[Tensor]]:
    out_dtype = scaled_dtype(x, scale, divisor)
    keep = any(wanted)
    if road.name == "kernel" and (training or not keep):
        c = columns(bias, scale, divisor, alpha, bn_weight, bn_bias, eps)
        if training:
            return kernel_training(x, weight, c, running_mean, running_var, momentum, out_dtype, keep, update)
        out = kernel_evaluation(x, weight, c, running_mean, running_var, out_dtype)
        return (out, *((None, None) if update else (x.new_empty(0), x.new_empty(0)))), ()
    dtype = wide(out_dtype)
    s = factors(x, weight, scale, divisor, alpha, dtype)
    y = F.linear(x, weight, bias)
    nothing = None if update else x.new_empty(0)
    if not training:
        assert running_mean is not None and running_var is not None
        out, saved = closed.evaluate(y, s, bn_weight, bn_bias, running_mean, running_var, eps, dtype, keep)
        return (out.to(out_dtype), nothing, nothing if update else x.new_empty(0)), saved
    out, (new_mean, new_var), saved = closed.train(
        y, s, bn_weight, bn_bias, running_mean, running_var, momentum, eps, dtype, keep
    )
    if not update:
        return (out.to(out_dtype), buffer(new_mean, x, True), buffer(new_var, x, True)), saved
    if running_mean is not None and running_var is not None:
        running_mean.copy_(new_mean)  # type: ignore[arg-type]
        running_var.copy_(new_var)  # type: ignore[arg-type]
    return (out.to(out_dtype), None, None), saved


def saves(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    *others: Any,
    wanted: Sequence[bool],
) -> Sequence[Tensor]:
    if not any(wanted):
        return ()
    dtype, n, training = wide(scaled_dtype(x, scale, divisor)), weight.size(0), others[5]
    y = F.linear(x, weight, bias)
    if training and road(x, weight, bias, scale, divisor, *others).name == "kernel":
        return y, x.new_empty(3, n, dtype=torch.float32)
    return y, x.new_empty(n, dtype=dtype), x.new_empty(n, dtype=dtype)


def backward(
    road: Road,
    grad: Tensor,
    saved: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    if training and road.name == "kernel":
        return kernel_gradients(grad, saved, x, weight, bias, scale, divisor, alpha, bn_weight, bn_bias, eps, wanted)
    dtype = wide(grad.dtype, saved[0].dtype)
    s = factors(x, weight, scale, divisor, alpha, dtype)
    dy, d_gamma, d_beta, d_s = closed.gradient(grad.to(dtype), saved, s, bn_weight, eps, training, any(wanted[3:6]))
    return gradients(dy, d_gamma, d_beta, d_s, s, x, weight, bias, scale, divisor, alpha, training, wanted)


def again(saved: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    training = args[10]
    statistics = (None, None) if training else saved[1:3]
    return reference(*args[:8], *statistics, *args[10:])


def autocast(
    device: str, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, *others: object
) -> tuple[object, ...]:
    return cast(dtype, x), cast(dtype, weight), cast(dtype, bias), *others


def direct(x: Tensor, weight: Tensor, *others: Any) -> str:
    if x.is_cuda:
        graph = torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, *others[:6])
        if x.dim() != 2:
            return "not x[M, K]"
        few = x.size(0) <= FEW_ROWS
        if few and (graph or (others[8] and not one_launch(x, weight, *others))):
            return "too few rows for a pass of their own"
        if graph:
            return gemm.launches_dominate(x, weight, 6 if others[8] else 12)
        return ""
    if others[8]:
        return "in training ATen's batch_norm is the shortest on the CPU"
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, *others[:6]):
        return "the product dominates, and ATen's own backward has the least to do around it"
    return "" if x.numel() * weight.size(0) >= 1 << 20 else "small"


def told(road: Road, x: Tensor, weight: Tensor, *others: Any) -> Road:
    graph = torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, *others[:6])
    return SMALL if road.name == "kernel" and not graph and one_launch(x, weight, *others) else road


SMALL = Road("kernel", f"scale and BatchNorm in the product's epilogue; {small_gemm.ONE_LAUNCH}")

OP = Op(
    "linear_scale_batchnorm1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? divisor, float alpha, Tensor? bn_weight,"
    " Tensor? bn_bias, Tensor? running_mean, Tensor? running_var, bool training, float momentum, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference,
    road=road,
    forward=forward,
    backward=backward,
    saves=saves,
    again=again,
    autocast=autocast,
    buffers=("running_mean", "running_var"),
    direct=direct,
    told=told,
)


@OP.public
def linear_scale_batchnorm1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    divisor: Tensor | None = None,
    alpha: float = 1.0,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """batch_norm(alpha · linear(x, weight, bias) · scale / divisor); running statistics are updated in place.

    Args:
        x: [M, K].
        weight, bias: [N, K] and [N] or None, as nn.Linear has them.
        scale, divisor: [N], a single number, anything that broadcasts against [M, N], or None.
        alpha: every scalar factor between the product and BatchNorm, multiplied out.
        bn_weight, bn_bias: γ and β, [N] or None.
        running_mean, running_var: [N] or None; updated in place when `training`.
        training: normalise by the batch's statistics. momentum, eps: as torch.nn.functional.batch_norm has them.

    Returns [M, N] in the dtype type promotion gives the scaled product.
    Raises what torch.nn.functional.linear and batch_norm raise, ValueError for one row in training among them.
    """
    statistics = (running_mean, running_var, training, momentum, eps)
    args: tuple[Any, ...] = (x, weight, bias, scale, divisor, alpha, bn_weight, bn_bias, *statistics)
    if not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cuda:
        return _call((id(weight), x.shape, training), args, None)
    return _ordinary(args)


def _ordinary(args: tuple[Any, ...]) -> Tensor:
    """The op, with the running statistics updated."""
    running_mean, running_var, training = args[8:11]
    if torch.compiler.is_compiling():
        out, new_mean, new_var = OP.overload(*args)
    elif torch._C._has_torch_function(args):
        traced: Tensor = handle_torch_function(linear_scale_batchnorm1d, args, *args)
        return traced
    else:
        out, new_mean, new_var = OP.plain(args)
    if training and new_mean is not None:
        if running_mean is not None:
            running_mean.copy_(new_mean)
        if running_var is not None:
            running_var.copy_(new_var)
    result: Tensor = out
    return result


CALLS, STEPS = Calls(), Kinds()


def _call(key: tuple[Any, ...], args: tuple[Any, ...], batches: Tensor | None) -> Tensor:
    """The op on a GPU; `batches`, when given, counts one more batch."""
    x, weight, bias, scale, divisor, alpha, bn_weight, bn_bias, mean, var, training, momentum, eps = args
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight):
        return _step(args, batches)
    tensors = (x, weight, bias, scale, divisor, bn_weight, bn_bias, mean, var, batches)
    numbers = (alpha, training, momentum, eps)
    launch = CALLS.find(key, tensors, numbers)
    if launch is not None and (out := launch(x, weight, bias)) is not None:
        return out
    if batches is not None:
        batches.add_(1)
    out = _ordinary(args)
    if OP.inference(args):
        CALLS.keep(key, tensors, numbers, lambda: _launch(args, batches))
    return out


def _step(args: tuple[Any, ...], batches: Tensor | None) -> Tensor:
    """A call whose gradient is wanted, by what a call like it came to."""
    x, weight, bias, scale, divisor, _, bn_weight, bn_bias, mean, var, training, _, eps = args
    tensors = (x, weight, bias, scale, divisor, bn_weight, bn_bias, mean, var, batches)
    given = [t for t in tensors if t is not None]
    absent = bias is None, scale is None, divisor is None, bn_weight is None, bn_bias is None, mean is None
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    key = training, eps, absent, len(given), aligned, gemm.float32_settings() if x.dtype is torch.float32 else None

    def ordinary() -> tuple[Tensor]:
        if batches is not None:
            batches.add_(1)
        return (_ordinary(args),)

    counted = (*args, batches)
    out: Tensor = STEPS.call(
        OP, counted, key, *given, ordinary=ordinary, make=lambda: _batchnorm_step.kind(OP, args, batches)
    )[0]
    return out


def _launch(args: tuple[Any, ...], batches: Tensor | None) -> Launch | None:
    """The call as a launch, where nothing has to be copied for it."""
    x, weight, bias, scale, divisor, alpha, bn_weight, bn_bias, mean, var, training, momentum, eps = args
    if OP.road(*args).name != "kernel":
        return None
    if any(t is not None and not t.is_contiguous() for t in (bias, scale, divisor, bn_weight, bn_bias, mean, var)):
        return None
    if batches is not None and (batches.dtype is not torch.int64 or batches.get_device() != x.get_device()):
        return None
    c = columns(bias, scale, divisor, alpha, bn_weight, bn_bias, eps)
    rest = (mean, var, scaled_dtype(x, scale, divisor), training, momentum, batches)
    if small_gemm.why_not(x, weight, mode(training)) is None:
        return small_gemm.batchnorm(x, weight, c, *rest)
    how = behind(x, training, rest[2])
    if gemm.why_not_product(x, weight, how) is None:
        if not training:
            return small_gemm.large_evaluation(x, weight, c, mean, var, rest[2])
        if how == "statistics":
            return None
        return small_gemm.large_training(x, weight, c, mean, var, momentum, batches)
    passes = training and not one_pass(x.size(0), weight.size(0))
    step = kernels.block_rows(x.size(0)) if passes else 0
    with_bias = product_has_bias(x, training)
    return small_gemm.after_batchnorm(x, weight, c._replace(bias=None) if with_bias else c, *rest, with_bias, step)


def linear_scale_batchnorm1d_module(
    bn: nn.BatchNorm1d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    divisor: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """`bn(alpha · linear(x, weight, bias) · scale / divisor)`, with `bn` read at the time of the call.

    Mode, momentum (None is the cumulative average), track_running_stats and num_batches_tracked are nn.BatchNorm1d's.
    Raises ValueError, as `bn` does, when x is neither 2-D nor 3-D.
    """
    tensors = (x, weight, bias, scale, divisor)
    # a symbolic trace keeps the call whole
    if torch._C._has_torch_function(tensors) and any(issubclass(type(t), torch.fx.Proxy) for t in tensors):
        traced: Tensor = handle_torch_function(
            linear_scale_batchnorm1d_module, tensors, bn, x, weight, bias, scale, divisor, alpha
        )
        return traced
    bn._check_input_dim(x)
    training, momentum = bool(bn.training), bn.momentum
    bn_weight, bn_bias, mean, var, batches = _tensors_of(bn)
    if not training or not bn.track_running_stats:
        batches = None
    elif momentum is None and batches is not None:
        batches.add_(1)
        momentum, batches = 1.0 / float(batches), None
    if momentum is None:
        momentum = 0.0
    if training and not bn.track_running_stats:
        mean = var = None
    by_batch = training or (mean is None and var is None)
    args: tuple[Any, ...] = (
        x, weight, bias, scale, divisor, alpha, bn_weight, bn_bias, mean, var, by_batch, momentum, bn.eps
    )  # fmt: skip
    if not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cuda:
        return _call((id(bn), x.shape, by_batch), args, batches)
    if batches is not None:
        batches.add_(1)
    return linear_scale_batchnorm1d(*args)


def _tensors_of(bn: nn.BatchNorm1d) -> tuple[Tensor | None, ...]:
    """Its parameters and buffers, from where nn.Module keeps them: asking for them as attributes takes longer."""
    try:
        p, b = bn._parameters, bn._buffers
        return p["weight"], p["bias"], b["running_mean"], b["running_var"], b["num_batches_tracked"]
    except KeyError:  # kept in another way
        return bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked
