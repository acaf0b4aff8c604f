"""When the Hopper GEMM's smaller tiles pay, with everything behind the product in their epilogue: what they take on a
GPU, by rules drawn from sizes that ``benchmarks/device_narrow.py`` measured."""

from __future__ import annotations

import functools
import math

from fxfuse.kernels.small_rule import library_us

__all__ = ["pays", "product_pays", "us"]


@functools.lru_cache(maxsize=4096)
def us(m: int, n: int, k: int, size: int, exact: bool, op: str, processors: int) -> float:
    """What the Hopper GEMM takes in tiles of 128 x 64, or where these have no room at once, of 128 x 128, with all of
    the op in its epilogue: its start, and a block's stages of 128 bytes of K. inf where neither has room.

    size: bytes of an element of x. exact: IEEE float32. op: "activation", "evaluation" or "training". processors: the
    GPU's multiprocessors.
    """
    rows, steps = -(-m // 128), -(-k * size // 128)
    if not 0 < rows <= processors or n < 1 or k < 1 or (op == "training" and m > 1024):
        return math.inf
    room, narrow, wide = processors - processors % rows, rows * -(-n // 64), rows * -(-n // 128)
    if wide > room:
        return math.inf
    behind = _BEHIND_US[op] if exact or op == "training" else 0.0
    if exact:
        start, stage = (2.9 + 0.006 * narrow, 0.66) if narrow <= room else (4.3, 1.37)
        return start + behind + steps * stage
    many = max(0, narrow - 64)
    amid = 0.0 if k * size % 128 == 0 else 0.05 if k * size % 32 == 0 else 0.15  # rows that start amid a cache line
    if narrow <= room:
        if steps > 64:
            return math.inf  # the library has K shared out
        start, stage = 2.3, 0.155 + 0.001 * many + amid + (0.004 * many if amid else 0.0)
        if many and (m + n) * k * size > 12e6:
            stage *= 1.25
        stage += 4e-5 * max(0, (rows * 128 - m) * -(-n // 64) - 1000)  # rows beyond x take longer than its own
    else:
        start, stage = 2.8, (0.5 if m % 128 else 0.35) + amid
    return start + behind + steps * stage


#: What stands behind the product; but for training, 16 bits' and TF32's starts have it already.
_BEHIND_US = {"activation": 0.0, "evaluation": 0.6, "training": 2.8}


def pays(m: int, n: int, k: int, size: int, exact: bool, op: str, processors: int) -> bool:
    """Whether that is expected to be no slower than the library's product and the pass behind it, but for the tenth
    that eager's own kernels take longer at least."""
    rate = _IEEE_RATE["activation" if op == "activation" else "product"] if exact else _RATE[size]
    start = library_us(m, n, 0, size, exact, op)
    library = max(library_us(m, n, k, size, exact, op), start + 2 * m * n * k / rate)
    library += 2 * m * n * size / _BANDWIDTH
    if op == "training" and m > 256:
        library += 3.0
    return us(m, n, k, size, exact, op, processors) <= 1.1 * library


def product_pays(m: int, n: int, k: int, processors: int) -> bool:
    """The same for a product in IEEE float32 alone, whose operands may lie across the contraction. Small ones, which
    were not measured, stay with the library."""
    library = 5.0 + 2 * m * n * k / _IEEE_RATE["product"]
    return m * n * k >= 1 << 27 and 1.12 * us(m, n, k, 4, True, "activation", processors) <= library


#: What the library reaches at the most: operations a microsecond, by the size of an element; and in IEEE float32, where
#: a product with a bias behind it is another kernel. Bytes a microsecond.
_RATE = {2: 600e6, 4: 300e6}
_IEEE_RATE = {"product": 48e6, "activation": 38e6}
_BANDWIDTH = 4e6
