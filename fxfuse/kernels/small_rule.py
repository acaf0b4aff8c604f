"""When ``small_gemm`` pays: what it takes on a GPU, and what the library's product and the pass behind it take, by
rules drawn from sizes that ``benchmarks/device_small.py`` and, for the library, ``device_narrow.py`` measured."""

from __future__ import annotations

import functools
import math

__all__ = ["library_us", "pays", "unaligned_pays"]


def pays(
    m: int, n: int, k: int, size: int, exact: bool, op: str, processors: int, captured: bool, narrow: float = math.inf
) -> bool:
    """Whether ``small_gemm`` is expected to be at least as fast on the GPU as the library's product and the pass behind
    it; or, outside of CUDA graphs, so fast that only the host's time counts, which a launch less shortens, and still
    about as fast as eager's own kernels.

    size: bytes of an element of x. exact: IEEE float32, by multiply-adds. op: "activation", "evaluation" or "training".
    processors: the GPU's multiprocessors. narrow: ``narrow_rule.us``, where the Hopper GEMM takes the product. All
    times are rules drawn from measured sizes (see docs/kernels-gemm.md).
    """
    if m > 256 or k > 8192 or n > 65536:
        return False
    taken, library = _small_us(m, n, k, size, exact, op == "training", processors), library_us(m, n, k, size, exact, op)
    if taken > narrow + (_COOPERATIVE_US if op == "training" and not captured else 0.0):
        return False
    return taken <= library or (not captured and taken <= min(_HOST_US[op], 1.25 * (library + _PASSES_US[op])))


#: What a call of several launches costs the host, at the least; the Hopper GEMM's training is one.
_HOST_US = {"activation": 18.0, "evaluation": 24.0, "training": 18.0}
_PASSES_US = {"activation": 1.8, "evaluation": 4.0, "training": 5.0}  # of eager's kernels, beyond the pass behind it
_COOPERATIVE_US = 5.0  # what the Hopper GEMM's training costs the host beyond a call of ``small_gemm``


@functools.lru_cache(maxsize=4096)
def _small_us(m: int, n: int, k: int, size: int, exact: bool, all_rows: bool, processors: int) -> float:
    """What ``small_gemm`` takes: its start, and the time in which a multiprocessor gets (or multiplies) its tiles."""
    rows, columns = _all_rows_tile(m, n, processors) if all_rows else _small_tile(m, n, processors)
    each = -(-m // rows) * -(-n // columns) / processors
    rate = 42e3 if all_rows else 36e3  # bytes a microsecond
    work = rows * columns * k / _FMA[rows, columns] if exact else (rows + columns) * k * size / rate
    return 2.3 + 1.2 * all_rows + 0.8 * min(1.0, each) + max(1.0, each) * work


#: Multiply-adds a nanosecond that a tile reaches, times 1000.
_FMA = {(16, 16): 47e3, (32, 16): 62e3, (32, 32): 85e3, (64, 32): 100e3, (64, 64): 120e3,
        (64, 16): 75e3, (128, 16): 80e3, (256, 16): 85e3, (256, 32): 60e3}  # fmt: skip


def _small_tile(m: int, n: int, processors: int) -> tuple[int, int]:
    """launch_any in small_gemm.cuh."""
    if m <= 16:
        return 16, 16
    for rows, columns in ((32, 16), (32, 32), (64, 32)):
        if (m <= rows and columns == 32) or -(-m // rows) * -(-n // columns) <= processors:
            return rows, columns
    return 64, 64


def _all_rows_tile(m: int, n: int, processors: int) -> tuple[int, int]:
    """launch_all_rows in small_gemm.cuh."""
    for rows in (16, 64, 128):
        if m <= rows:
            return rows, 16
    return 256, 32 if n >= processors * 12 else 16


def library_us(m: int, n: int, k: int, size: int, exact: bool, op: str) -> float:
    """What the library's product and the pass behind it take at least, where the product is small."""
    if not exact or m == 1 or op == "activation":
        return _whole_us(m, k, size, exact, op)
    return min(_whole_us(m, k, size, exact, op), 7.0 + k / 450 + 2 * m * n * k / 40e6)  # K shared out among blocks


def _whole_us(m: int, k: int, size: int, exact: bool, op: str) -> float:
    """The same where a block has all of K."""
    many = m >= 64
    if size == 2:
        base, slope = {"activation": (3.5, 660), "evaluation": (6.5, 640) if many else (5.2, 700),
                       "training": (6.6, 500)}[op]  # fmt: skip
    elif not exact:
        base, slope = {"activation": (5.0, 400), "evaluation": (8.3, 600) if many else (6.5, 500),
                       "training": (7.8, 500)}[op]  # fmt: skip
    elif m == 1:
        base, slope = (3.3, 2000) if op == "activation" else (4.5, 2000)
    elif m <= 16:
        base, slope = (3.2, 370 if m <= 4 else 180) if op == "activation" else (6.5, 160)
    elif op == "activation":
        base, slope = 8.0, 60 if many else 170
    else:
        base, slope = (8.6, 200) if op == "training" else (8.0, 90 if m >= 128 else 200)
    return base + k / slope


def unaligned_pays(m: int, n: int, k: int) -> bool:
    """The same where rows do not start at multiples of 16 bytes and come an element at a time."""
    return m * n * k <= 1 << 24
