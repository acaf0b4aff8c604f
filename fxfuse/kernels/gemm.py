"""What the Hopper GEMM takes, and when it pays: shared by the ops whose product it computes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels import narrow_rule
from fxfuse.kernels.abi import DTYPE_CODE, aligned, allocate, any_other_layout, stream
from fxfuse.kernels.loader import library

__all__ = [
    "FLOAT32",
    "float32_off",
    "float32_on_tensor_cores",
    "float32_settings",
    "ieee",
    "is_hopper",
    "launches_dominate",
    "matmul",
    "narrow_us",
    "pitch",
    "processors",
    "rows",
    "sides",
    "tf32_allowed",
    "why_not_kernels",
    "why_not_product",
]


#: For a person: what happens to float32 products that must be IEEE, and why that is right.
FLOAT32 = (
    "IEEE float32 products of some size run on the tensor cores, each number as three bf16, summed in float32: "
    "no less exact than cuBLAS's float32 and twice as fast (FXFUSE_FLOAT32=library turns it off)"
)


@functools.lru_cache(maxsize=64)
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _getenv(name: str) -> str:
    """An environment variable as it is now, "" where it is not set."""
    if _environment is None:
        return os.environ.get(name, "")
    return _environment.get(os.fsencode(name), b"").decode()


# os.environ's own table of bytes: asked at every call, and os.environ takes ten times as long to answer.
_environment: dict[bytes, bytes] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None


@functools.lru_cache(maxsize=64)
def processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.0, unless FXFUSE_PORTABLE says to act as on 8.0."""
    return _capability(device.index) == (9, 0) and _getenv("FXFUSE_PORTABLE") in ("", "0")


_precision = torch._C._get_fp32_precision_getter


def tf32_allowed() -> bool:
    """Whether the user lets float32 products be computed in TF32."""
    precision = _precision("cuda", "matmul")
    return bool((_precision("generic", "all") if precision == "none" else precision) == "tf32")


def float32_settings() -> tuple[Any, ...]:
    """Everything but the tensors that decides how float32 products are computed."""
    return _precision("cuda", "matmul"), _precision("generic", "all"), _getenv("FXFUSE_FLOAT32")


def ieee(x: Tensor) -> bool:
    """Whether products of this tensor must be float32's: float32, and TF32 is not allowed."""
    return x.dtype is torch.float32 and not tf32_allowed()


def float32_off() -> bool:
    """FXFUSE_FLOAT32=library: products in IEEE float32 stay with the library."""
    return _getenv("FXFUSE_FLOAT32") == "library"


def float32_on_tensor_cores(x: Tensor) -> bool:
    """Whether products of this tensor are float32's, and large ones are computed as ``FLOAT32`` says."""
    return ieee(x) and is_hopper(x.device) and not float32_off()


def why_not_kernels(x: Tensor, *others: Tensor | None) -> str | None:
    """The reason why the kernels cannot work on these tensors, None when they can."""
    if not x.is_cuda:
        return f"no kernel for {x.device.type}"
    if x.dtype not in DTYPE_CODE:
        return f"no kernel for {x.dtype}"
    index = x.get_device()
    for t in others:
        if t is not None and t.get_device() != index:
            return "not all on one CUDA device"
    if any_other_layout(x, *others):
        return "a layout that is not strided, or a pending negation"
    return None if library() is not None else "the CUDA kernels are not there"


def rows(t: Tensor) -> tuple[Tensor, int] | None:
    """t [..., K] as (matrix [rows, K] that shares its memory, elements between rows) as the copy engine reads it; None
    where that needs a copy: K not contiguous, or a base or pitch that is no multiple of 16 bytes."""
    if t.dim() != 2:
        if not t.is_contiguous():
            return None
        t = t.view(-1, t.size(-1))
    unit = 16 // t.element_size()
    between = pitch(t)
    if t.size(1) > 1 and t.stride(1) != 1:
        return None
    if between % unit or between < t.size(1) or not aligned(t):
        return None
    return t, between


def sides(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, bool, bool] | None:
    """a [M, K] and b [K, N] as row-major matrices that the copy engine reads, each with whether its rows lie across the
    contraction; None where one is neither, or only a's do."""
    along_k, along_n = rows(a), rows(b)
    if along_k is not None and along_n is not None:
        return a, b, False, True
    if along_k is not None and rows(b.t()) is not None:
        return a, b.t(), False, False
    if along_n is not None and rows(a.t()) is not None:
        return a.t(), b, True, True
    return None


def matmul(function: Callable[..., None], a: Tensor, b: Tensor, *codes: int) -> Tensor:
    """a [M, K] times b [K, N], contiguous, by a kernel that takes both as ``sides`` finds them, which is not None;
    codes: what it asks before the device."""
    found = sides(a, b)
    assert found is not None
    left, right, along_m, along_n = found
    (m, k), n, device = a.shape, b.size(1), a.get_device()
    out = allocate((m, n), (n, 1), a.dtype, device)
    function(
        left.data_ptr(), right.data_ptr(), out.data_ptr(), m, n, k, pitch(left), pitch(right), along_m, along_n, *codes,
        device, stream(device),
    )  # fmt: skip
    return out


def pitch(matrix: Tensor) -> int:
    """Elements between the rows of a row-major matrix."""
    return matrix.stride(0) if matrix.size(0) > 1 else max(matrix.size(1), 1)


def why_not_product(x: Tensor, weight: Tensor, op: str = "activation") -> str | None:
    """The reason why the Hopper GEMM is not used for x [..., K] and weight [N, K] of one dtype; None when it is.

    The library's GEMM is taken where it is faster: products of few tiles and long K, or of tiles that do not fill their
    last round. float32 that must not be rounded to TF32 has its own mainloop (docs/float32.md). op: what stands behind
    the product in the same kernel: "activation", "evaluation", "training", or "statistics" alone.
    """
    n, k = weight.shape
    m = x.numel() // max(k, 1)
    exact = ieee(x)
    if not is_hopper(x.device):
        return "not a Hopper GPU"
    if not _any_tiles_pay(m, n, k, x, exact, op):
        return "a product of this size is faster in the library"
    if exact and float32_off():
        return "FXFUSE_FLOAT32=library leaves IEEE float32 products to the library"
    if n % (16 // x.element_size()):
        return "N is no multiple of 16 bytes"
    if m >= 2**31 or n >= 2**31 or k >= 2**31:
        return "a size of 2^31 or more"
    if rows(x) is None or rows(weight) is None:
        return "x or weight has rows that are not contiguous and 16-byte aligned"
    return None


def narrow_us(x: Tensor, weight: Tensor, op: str) -> float:
    """What ``why_not_product``'s kernel takes for a small product, in microseconds on the GPU; inf where it is not
    taken."""
    if why_not_product(x, weight, op) is not None:
        return math.inf
    (n, k), device = weight.shape, x.get_device()
    return narrow_rule.us(x.numel() // k, n, k, x.element_size(), ieee(x), op, processors(device))


def _any_tiles_pay(m: int, n: int, k: int, x: Tensor, exact: bool, op: str) -> bool:
    device = x.get_device()
    if float32_pays(m, n, k) if exact else pays(m, n, k, device, 1, op in ("training", "statistics")):
        return True
    if op == "statistics" or (m == 1 and x.element_size() == 4):  # the library's product of one row is float32's
        return False
    return narrow_rule.pays(m, n, k, x.element_size(), exact, op, processors(device))


def pays(m: int, n: int, k: int, device: int, spared: int = 0, whole_columns: bool = False) -> bool:
    """Whether the Hopper GEMM is expected to be no slower than the library's and ``spared`` passes, reading and writing
    the result, behind it: a rule drawn from some hundred measured sizes (see docs/kernels-gemm.md), not a table of all.

    The library chooses among tiles of many sizes, this kernel has one: what it computes beyond the result, in tiles
    over the edge and in a last round that is not full, is time lost.
    """
    rows, columns = -(-m // 256), -(-n // 256)
    if m < 256 or k < 512 or rows * columns < 50 or 256 * columns > n + n // 4:
        return False
    clusters = processors(device) // 2
    if whole_columns and rows <= min(4, clusters):
        clusters -= clusters % rows
    rounds = -(-rows * columns // clusters)
    return 65536 * clusters * rounds <= m * n * (_LIBRARY_LOSES + spared * _PASS / k)


_LIBRARY_LOSES = 1.05  # to tiles of its own that do not fill the device
_PASS = 240.0  # a pass's time over a product's, times K: 300 by _RATE and _BANDWIDTH, and part of it stays in L2


def float32_pays(m: int, n: int, k: int) -> bool:
    """The same for products in IEEE float32, over twice as fast by the tensor cores (see docs/float32.md)."""
    return m >= 128 and k >= 256 and -(-m // 128) * -(-n // 128) >= 80


_LAUNCH_US = 250.0  # what a training step of a fused op costs the host, above what eager's own backward costs it
_RATE = {torch.float16: 600e6, torch.bfloat16: 600e6}  # operations a microsecond that the library reaches
_BANDWIDTH = 4e6  # bytes a microsecond


def launches_dominate(x: Tensor, weight: Tensor, passes: int) -> str:
    """Why a training step of x [..., K] and weight [N, K] goes by eager's own operations: they keep the device busy for
    so short a time that what counts is the host's, where autograd in C++ beats a Python function. "" where the device
    counts, and while a CUDA graph is captured, which replays without the host.

    passes: memory passes over [..., N] that eager makes behind its three products.
    """
    if weight.dim() != 2:
        return ""
    tf32 = x.dtype is torch.float32 and tf32_allowed()
    if _busy_us(x.shape, weight.shape, x.dtype, tf32, passes) > _LAUNCH_US or torch.cuda.is_current_stream_capturing():
        return ""
    return "a step this small is bound by the host, where autograd in C++ is quicker"


@functools.lru_cache(maxsize=1024)
def _busy_us(x: torch.Size, weight: torch.Size, dtype: torch.dtype, tf32: bool, passes: int) -> float:
    """How long a training step of eager's own operations keeps the device busy, by rough rates."""
    n, k = weight
    m = x.numel() // max(k, 1)
    rate = _RATE.get(dtype) or (300e6 if tf32 else 50e6)
    return 6 * m * n * k / rate + passes * m * n * dtype.itemsize / _BANDWIDTH
