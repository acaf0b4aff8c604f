"""When ``small_gemm`` and the Hopper GEMM's smaller tiles pay: what they take on a GPU, and what the library's product
and the pass behind it take, by rules drawn from sizes that ``benchmarks/device_small.py`` and ``device_narrow.py``
measured."""

from __future__ import annotations

import functools
import math

__all__ = ["narrow_pays", "narrow_us", "pays", "unaligned_pays"]


def pays(
    m: int, n: int, k: int, size: int, exact: bool, op: str, processors: int, captured: bool, narrow: float = math.inf
) -> bool:
    """Whether ``small_gemm`` is expected to be at least as fast on the GPU as the library's product and the pass behind
    it; or, outside of CUDA graphs, so fast that only the host's time counts, which a launch less shortens, and still
    about as fast as eager's own kernels.

    size: bytes of an element of x. exact: IEEE float32, by multiply-adds. op: "activation", "evaluation" or "training".
    processors: the GPU's multiprocessors. narrow: ``narrow_us``, where the Hopper GEMM takes the product. All times are
    rules drawn from measured sizes (see docs/kernels-gemm.md).
    """
    if m > 256 or k > 8192 or n > 65536:
        return False
    taken, library = _small_us(m, n, k, size, exact, op == "training", processors), _library_us(m, k, size, exact, op)
    if taken > narrow + (_COOPERATIVE_US if op == "training" and not captured else 0.0):
        return False
    return taken <= library or (not captured and taken <= min(_HOST_US, 1.25 * (library + _PASSES_US[op])))


_HOST_US = 18.0  # what a call of several launches costs the host, at the least
_PASSES_US = {"activation": 1.8, "evaluation": 4.0, "training": 5.0}  # of eager's kernels, beyond the pass behind it
_COOPERATIVE_US = 5.0  # what the Hopper GEMM's training costs the host beyond a call of ``small_gemm``


@functools.lru_cache(maxsize=4096)
def narrow_us(m: int, n: int, k: int, size: int, op: str, processors: int) -> float:
    """What the Hopper GEMM takes in tiles of 128 x 64, or where these have no room at once, of 128 x 128, with all of
    the op in its epilogue: its start, and a block's stages of 128 bytes of K. inf where neither has room."""
    rows, steps = -(-m // 128), -(-k * size // 128)
    if not 0 < rows <= processors or n < 1 or k < 1 or (op == "training" and m > 1024):
        return math.inf
    tiles, room, start = rows * -(-n // 64), processors - processors % rows, 2.3
    many = max(0, tiles - 64)
    amid = 0.0 if k * size % 128 == 0 else 0.05 if k * size % 32 == 0 else 0.15  # rows that start amid a cache line
    if tiles <= room:
        if steps > 64:
            return math.inf  # the library has K shared out
        stage = 0.155 + 0.001 * many + amid + (0.004 * many if amid else 0.0)
        if many and (m + n) * k * size > 12e6:
            stage *= 1.25
        stage += 4e-5 * max(0, (rows * 128 - m) * -(-n // 64) - 1000)  # rows beyond x take longer than its own
    elif rows * -(-n // 128) <= room:
        start, stage = 2.8, (0.5 if m % 128 else 0.35) + amid
    else:
        return math.inf
    return start + (2.8 if op == "training" else 0.0) + steps * stage


def narrow_pays(m: int, n: int, k: int, size: int, op: str, processors: int) -> bool:
    """Whether that is expected to be no slower than the library's product and the pass behind it, but for the tenth
    that eager's own kernels take longer at least."""
    start, (rate, moved) = _library_us(m, 0, size, False, op), _LIBRARY[size]
    library = max(_library_us(m, k, size, False, op), start + 2 * m * n * k / rate) + 2 * m * n * size / moved
    if op == "training" and m > 256:
        library += 3.0
    return narrow_us(m, n, k, size, op, processors) <= 1.1 * library


_LIBRARY = {2: (600e6, 4e6), 4: (300e6, 4e6)}  # operations and bytes a microsecond, by the size of an element


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


def _library_us(m: int, k: int, size: int, exact: bool, op: str) -> float:
    """What the library's product and the pass behind it take at least, where the product is small."""
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
        base, slope = (3.2, 180) if op == "activation" else (6.5, 160)
    elif op == "activation":
        base, slope = 8.0, 60 if many else 170
    else:
        base, slope = (8.6, 200) if op == "training" else (8.0, 90 if m >= 128 else 200)
    return base + k / slope


def unaligned_pays(m: int, n: int, k: int) -> bool:
    """The same where rows do not start at multiples of 16 bytes and come an element at a time."""
    return m * n * k <= 1 << 24
