"""Calls into ``small_gemm.cu``: a product of few rows with everything behind it, in one launch; and, kept in the same
way, products of Hopper's GEMM, and the pass behind those that the library computes.

What does not change from call to call is handed over once, as a structure (:class:`Launch` and :class:`AfterProduct`
keep it); a call is then a result's memory and a few pointers.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.kernels import gemm, small_rule
from fxfuse.kernels.abi import DTYPE_CODE, NOT_SUPPORTED, PTR, aligned, allocate, pointer, stream
from fxfuse.kernels.counters import counters_of
from fxfuse.kernels.linear_scale_batchnorm1d import NO_ROOM, PRODUCT_ROWS, Columns, counters_for
from fxfuse.kernels.loader import KernelError, library

if TYPE_CHECKING:
    from fxfuse.kernels.linear_activation_scale import Act

__all__ = [
    "ONE_LAUNCH",
    "AfterProduct",
    "LargeLaunch",
    "LargeTraining",
    "Launch",
    "activation",
    "after_activation",
    "after_batchnorm",
    "batchnorm",
    "large_activation",
    "large_evaluation",
    "large_training",
    "one_launch",
    "why_not",
]

#: For a person: why products of few rows go their own way.
ONE_LAUNCH = "a product this small takes one launch, which a call like one made before goes to at once"

_ONE_FOR_ALL = 8  # kOneForAll in column_vector.cuh
_I64, _FLOAT, _DOUBLE = ctypes.c_int64, ctypes.c_float, ctypes.c_double


class _Vector(ctypes.Structure):
    _fields_ = [("data", PTR), ("code", _I64)]


class _Product(ctypes.Structure):
    _fields_ = [
        ("weight", PTR), ("m", _I64), ("n", _I64), ("k", _I64), ("pitch_x", _I64), ("pitch_w", _I64),
        ("dtype", _I64), ("out_dtype", _I64), ("ieee", _I64), ("device", _I64),
    ]  # fmt: skip


class _ActivationCall(ctypes.Structure):
    _fields_ = [
        ("product", _Product), ("bias", _Vector), ("activation", _I64),
        ("alpha", _FLOAT), ("beta", _FLOAT), ("pre_scale", _FLOAT), ("scale", _FLOAT),
    ]  # fmt: skip


class _BatchNormCall(ctypes.Structure):
    _fields_ = [
        ("product", _Product),
        *[(name, _Vector) for name in ("bias", "scale", "divisor", "gamma", "beta", "running_mean", "running_var")],
        ("batches", PTR), ("block_rows", _I64), ("training", _I64), ("momentum", _DOUBLE), ("multiplier", _DOUBLE),
        ("eps", _FLOAT),
    ]  # fmt: skip


class _Functions(NamedTuple):
    activation: Callable[..., int]
    batchnorm: Callable[..., int]
    large_activation: Callable[..., int]
    large_batchnorm: Callable[..., int]
    large_training: Callable[..., int]
    after_activation: Callable[..., int]
    after_batchnorm: Callable[..., int]


@functools.lru_cache(maxsize=1)
def _functions() -> _Functions:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    arguments = [PTR, PTR, PTR, PTR]
    return _Functions(
        found.raw("fxfuse_small_linear_activation_scale", arguments),
        found.raw("fxfuse_small_linear_scale_batchnorm1d", arguments),
        found.raw("fxfuse_large_linear_activation_scale", arguments),
        found.raw("fxfuse_large_linear_scale_batchnorm1d", arguments),
        found.raw("fxfuse_large_linear_scale_batchnorm1d_train", [*arguments, PTR, PTR]),
        found.raw("fxfuse_after_linear_activation_scale", arguments),
        found.raw("fxfuse_after_linear_scale_batchnorm1d", [*arguments, PTR]),
    )


class Launch:
    """A kernel with all its arguments but x: ``launch(x)`` gives the result. x is as it was when this was made, in
    everything but its memory's address; the memory of all other tensors stays where it was, and alive."""

    __slots__ = ("_address", "_call", "_device", "_dtype", "_function", "_shape", "_strides", "in_graphs")

    def __init__(
        self,
        function: Callable[..., int],
        call: ctypes.Structure,
        x: Tensor,
        n: int,
        dtype: torch.dtype,
        in_graphs: bool = True,
    ):
        self.in_graphs = in_graphs  # whether this is the way in CUDA graphs, too
        self._function, self._call, self._address = function, call, ctypes.addressof(call)
        self._shape, self._dtype, self._device = (*x.shape[:-1], n), dtype, x.get_device()
        self._strides = tuple(math.prod(self._shape[i + 1 :]) for i in range(len(self._shape)))

    def __call__(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        out = allocate(self._shape, self._strides, self._dtype, self._device)
        code = self._function(self._address, x.data_ptr(), out.data_ptr(), stream(self._device))
        if code:
            raise _failed(code)
        return out


class LargeLaunch(Launch):
    """The same for a product of Hopper's GEMM; None where the device is no longer to act as one (FXFUSE_PORTABLE)."""

    __slots__ = ()

    def __call__(  # type: ignore[override]
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor | None:
        try:
            return super().__call__(x)
        except KernelError as error:
            if error.code != NOT_SUPPORTED:
                raise
            return None


class LargeTraining(Launch):
    """The same for a batch's training, which takes scratch; None also where the device has no room for all blocks at
    once (part of it is set aside)."""

    __slots__ = ("_counters", "_where")

    def __init__(self, call: ctypes.Structure, x: Tensor, n: int):
        super().__init__(_functions().large_training, call, x, n, x.dtype)
        self._where, self._counters = x.device, counters_for(n)

    def __call__(  # type: ignore[override]
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor | None:
        out = allocate(self._shape, self._strides, self._dtype, self._device)
        m, n = self._shape
        scratch = allocate(((2 * -(-m // PRODUCT_ROWS) + 5) * n,), (1,), torch.float32, self._device)
        queue = stream(self._device)
        counters = counters_of(self._where, queue, self._counters)
        code = self._function(
            self._address, x.data_ptr(), out.data_ptr(), scratch.data_ptr(), counters.data_ptr(), queue
        )
        if code in NO_ROOM:
            return None
        if code:
            raise _failed(code)
        return out


class AfterProduct:
    """The library's product, then a kernel with all its arguments but the product: ``after(x, weight, bias)``.

    Everything is as it was when this was made but for the address of x. with_bias: whether the product takes the bias.
    scratch: elements of float32 that the kernel wants, None where it takes none.
    """

    in_graphs = True
    __slots__ = ("_address", "_bias", "_call", "_device", "_dtype", "_function", "_scratch")

    def __init__(
        self,
        function: Callable[..., int],
        call: ctypes.Structure,
        x: Tensor,
        dtype: torch.dtype,
        with_bias: bool,
        scratch: int | None,
    ):
        self._function, self._call, self._address = function, call, ctypes.addressof(call)
        self._dtype, self._device, self._bias, self._scratch = dtype, x.get_device(), with_bias, scratch

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        acc = F.linear(x, weight, bias if self._bias else None)
        out = acc if acc.dtype is self._dtype else torch.empty_like(acc, dtype=self._dtype)
        rest: tuple[int | None, ...] = (stream(self._device),)
        if self._scratch is not None:
            scratch = None  # as long as the launch takes
            if self._scratch:
                scratch = allocate((self._scratch,), (1,), torch.float32, self._device)
            rest = (pointer(scratch), *rest)
        code = self._function(self._address, acc.data_ptr(), out.data_ptr(), *rest)
        if code:
            raise _failed(code)
        return out


def _failed(code: int) -> KernelError:
    found = library()
    return KernelError(f"a kept call: {found.error(code) if found else code}", code)


def matrix(t: Tensor) -> tuple[int, int] | None:
    """t [..., K] as (rows, elements between rows), where its rows are contiguous and evenly spaced."""
    k = t.size(-1)
    if t.dim() != 2:
        return (t.numel() // max(k, 1), k) if t.is_contiguous() else None
    if k > 1 and t.stride(1) != 1:
        return None
    return t.size(0), t.stride(0)


def why_not(x: Tensor, weight: Tensor, op: str = "activation") -> str | None:
    """The reason why this kernel is not used for x [..., K] and weight [N, K] of one dtype on a GPU; None when it is.

    op: "activation", "evaluation" or "training". By shapes, strides, dtype and settings alone, and whether x and weight
    start at a multiple of 16 bytes, and whether a CUDA graph is being captured: the same call takes the same kernel.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.dtype not in DTYPE_CODE:
        return "not x[..., K] and weight[N, K] of a dtype that has a kernel"
    a, b = matrix(x), matrix(weight)
    n, k = weight.shape
    if a is None or b is None:
        return "rows that are not contiguous"
    if a[0] == 0 or n == 0 or k == 0:
        return "nothing to multiply"
    sizes = a[0], n, k, x.element_size(), (exact := _exact(x, a[0], n, k)), op, gemm.processors(x.get_device())
    narrow = _narrow_us(x, weight, op, exact)
    if not small_rule.pays(*sizes, captured=torch.cuda.is_current_stream_capturing(), narrow=narrow):
        return "a product this large is faster in the library, or in Hopper's GEMM"
    if exact and gemm.float32_off() and gemm.ieee(x):
        return "FXFUSE_FLOAT32=library leaves IEEE float32 products to the library"
    unit = 16 // x.element_size()
    even = not ((a[1] % unit and a[0] > 1) or (b[1] % unit and n > 1))
    if not (even and aligned(x) and aligned(weight)) and not small_rule.unaligned_pays(a[0], n, k):
        return "rows that are not 16-byte aligned"
    return None


def one_launch(x: Tensor, weight: Tensor, op: str = "activation", behind: str = "") -> bool:
    """Whether a small product and all behind it are one launch, of this kernel or of Hopper's GEMM. behind: op as
    ``gemm.why_not_product`` has it, where that is another."""
    return why_not(x, weight, op) is None or gemm.narrow_us(x, weight, behind or op) < math.inf


def activation(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> Launch:
    """linear_activation_scale as a launch: out [..., N] of x's dtype. bias: [N] or None, contiguous, in x's dtype.

    The caller has asked ``why_not`` and keeps every tensor's memory alive.
    """
    product = _product(x, weight, x.dtype)
    call = _ActivationCall(product, _vector(bias), *act.arguments())
    in_graphs = _in_graphs(product, x, weight, "activation")
    return Launch(_functions().activation, call, x, weight.size(0), x.dtype, in_graphs)


def batchnorm(
    x: Tensor,
    weight: Tensor,
    c: Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out_dtype: torch.dtype,
    training: bool,
    momentum: float = 0.0,
    batches: Tensor | None = None,
) -> Launch:
    """linear_scale_batchnorm1d as a launch: out [M, N] of ``out_dtype``, x's or float32. In training, for at most 256
    rows, it updates the running statistics in place, where given, and adds one to ``batches`` (int64, on the device).

    The caller has asked ``why_not`` and keeps every tensor's memory alive; vectors are contiguous.
    """
    product = _product(x, weight, out_dtype)
    call = _batchnorm_call(product, c, running_mean, running_var, training, momentum, batches)
    in_graphs = _in_graphs(product, x, weight, "training" if training else "evaluation")
    return Launch(_functions().batchnorm, call, x, weight.size(0), out_dtype, in_graphs)


def large_activation(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> LargeLaunch:
    """``activation`` as a product of Hopper's GEMM: ``gemm.why_not_product`` has been asked."""
    call = _ActivationCall(_product(x, weight, x.dtype), _vector(bias), *act.arguments())
    return LargeLaunch(_functions().large_activation, call, x, weight.size(0), x.dtype)


def large_evaluation(
    x: Tensor, weight: Tensor, c: Columns, mean: Tensor | None, var: Tensor | None, out_dtype: torch.dtype
) -> LargeLaunch:
    """``batchnorm`` in evaluation as a product of Hopper's GEMM: ``gemm.why_not_product`` has been asked."""
    call = _batchnorm_call(_product(x, weight, out_dtype), c, mean, var, False, 0.0, None)
    return LargeLaunch(_functions().large_batchnorm, call, x, weight.size(0), out_dtype)


def large_training(
    x: Tensor,
    weight: Tensor,
    c: Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    batches: Tensor | None,
) -> LargeTraining:
    """``batchnorm`` in training as a product of Hopper's GEMM, where ``gemm.why_not_product`` is None and
    ``behind`` says "training"."""
    call = _batchnorm_call(_product(x, weight, x.dtype), c, running_mean, running_var, True, momentum, batches)
    return LargeTraining(call, x, weight.size(0))


def after_activation(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> AfterProduct:
    """linear_activation_scale behind the library's product, for x contiguous."""
    n, k = weight.shape
    m, device, code = x.numel() // k, x.get_device(), DTYPE_CODE[x.dtype]
    call = _ActivationCall(_Product(None, m, n, k, 0, 0, code, code, 0, device), _Vector(None, 0), *act.arguments())
    return AfterProduct(_functions().after_activation, call, x, x.dtype, True, None)


def after_batchnorm(
    x: Tensor,
    weight: Tensor,
    c: Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out_dtype: torch.dtype,
    training: bool,
    momentum: float,
    batches: Tensor | None,
    with_bias: bool,
    block_rows: int = 0,
) -> AfterProduct:
    """linear_scale_batchnorm1d behind the library's product. with_bias: the product takes the bias, and c has none.

    In training all of it is one launch, for at most 1024 rows, or where ``block_rows`` is not 0 (what a partial of the
    statistics stands for) three.
    """
    (n, k), m = weight.shape, x.size(0)
    product = _Product(
        None, m, n, k, 0, 0, DTYPE_CODE[x.dtype], DTYPE_CODE[out_dtype], 0, x.get_device()
    )  # fmt: skip
    call = _batchnorm_call(product, c, running_mean, running_var, training, momentum, batches)
    call.block_rows = block_rows
    scratch = 3 * n if training else 0
    if block_rows:
        scratch += 3 * n + 2 * n * -(-m // block_rows)
    return AfterProduct(_functions().after_batchnorm, call, x, out_dtype, with_bias, scratch)


def _batchnorm_call(
    product: _Product,
    c: Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    batches: Tensor | None,
) -> _BatchNormCall:
    vectors = (c.bias, c.scale, c.divisor, c.weight, c.shift, running_mean, running_var)
    return _BatchNormCall(product, *map(_vector, vectors), pointer(batches), 0, training, momentum, c.alpha, c.eps)


def _product(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> _Product:
    a, b = matrix(x), matrix(weight)
    assert a is not None and b is not None
    n, k = weight.shape
    return _Product(
        weight.data_ptr(), a[0], n, k, a[1], b[1],
        DTYPE_CODE[x.dtype], DTYPE_CODE[out_dtype], _exact(x, a[0], n, k), x.get_device(),
    )  # fmt: skip


def _in_graphs(p: _Product, x: Tensor, weight: Tensor, op: str) -> bool:
    """Whether this kernel is also the way where the host's time does not count."""
    processors, narrow = gemm.processors(x.get_device()), _narrow_us(x, weight, op, bool(p.ieee))
    return small_rule.pays(p.m, p.n, p.k, x.element_size(), bool(p.ieee), op, processors, captured=True, narrow=narrow)


def _narrow_us(x: Tensor, weight: Tensor, op: str, exact: bool) -> float:
    """``gemm.narrow_us`` where that kernel is as exact."""
    return math.inf if exact and not gemm.ieee(x) else gemm.narrow_us(x, weight, op)


def _exact(x: Tensor, m: int, n: int, k: int) -> bool:
    """Whether products are float32's: where TF32 is allowed, with one row, column or term, as the library's are."""
    return x.dtype is torch.float32 and (m == 1 or n == 1 or k == 1 or gemm.ieee(x))


def _vector(t: Tensor | None) -> _Vector:
    if t is None:
        return _Vector(None, 0)
    return _Vector(t.data_ptr(), DTYPE_CODE[t.dtype] + (_ONE_FOR_ALL if t.numel() == 1 else 0))
