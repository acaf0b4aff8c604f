"""Roughly how fast a device moves bytes and multiplies: what the cost model divides by.

For GPUs that were measured the numbers are what large copies and matrix products reach; for others they follow from the
device's properties. A CPU is timed for a moment at first use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["Rates", "rates_of"]


@dataclass(frozen=True)
class Rates:
    """Ceilings of one device.

    Attributes:
        name: of the device.
        bandwidth: bytes a second through its memory.
        matrix: dtype ("float32", "tf32", "bfloat16", ...) -> operations a second in matrix products.
        vector: operations a second outside of matrix products, in float32.
        call: seconds an operation costs at least.
        origin: where the numbers are from, in words.
    """

    name: str
    bandwidth: float
    matrix: dict[str, float]
    vector: float
    call: float
    origin: str

    def product(self, dtype: str) -> float:
        """Matrix operations a second in ``dtype``, under the user's setting for float32 products."""
        if dtype == "float32" and "tf32" in self.matrix and torch.get_float32_matmul_precision() != "highest":
            dtype = "tf32"
        return self.matrix.get(dtype, min(self.matrix.values()))


def _gpu(bandwidth: float, double: float, single: float, tf32: float, half: float) -> dict[str, float]:
    """A row of the table: terabytes a second, then teraoperations a second."""
    matrix = {"float64": double, "float32": single, "tf32": tf32, "bfloat16": half, "float16": half}
    return {"bandwidth": bandwidth, **matrix}


#: reached by large copies and by products 1024 × 8192 × 8192 (H200), or 85 % of the data sheet (the others)
_KNOWN = {
    "H200": (_gpu(4.2, 55, 51, 380, 770), "measured on one H200"),
    "H100": (_gpu(2.85, 55, 51, 380, 770), "the H200's, with 85 % of the data sheet's bandwidth"),
    "A100": (_gpu(1.6, 16, 16.5, 130, 265), "85 % of the data sheet"),
}
_TERA = 1e12
_GPU_CALL = 4e-6  # seconds from one kernel to the next, launched from Python


def rates_of(device: str) -> Rates:
    """The rates of "cuda" (the current device) or "cpu". Any other device is taken for the CPU."""
    if device == "cuda" and torch.cuda.is_available():
        return _cuda(torch.cuda.current_device())
    return _cpu(torch.get_num_threads())


@cache
def _cuda(index: int) -> Rates:
    properties = torch.cuda.get_device_properties(index)
    for name, (table, origin) in _KNOWN.items():
        if name in properties.name:
            matrix = {dtype: rate * _TERA for dtype, rate in table.items() if dtype != "bandwidth"}
            return Rates(properties.name, table["bandwidth"] * _TERA, matrix, matrix["float32"], _GPU_CALL, origin)
    # kHz, twice a clock; a multiprocessor does 128 multiply-adds a clock in float32, on tensor cores 8 times as many
    clock = 1e3 * float(getattr(properties, "clock_rate", 1.5e6))
    memory = 2e3 * getattr(properties, "memory_clock_rate", 1e7) * getattr(properties, "memory_bus_width", 256) / 8
    single = 0.85 * properties.multi_processor_count * 128 * 2 * clock
    half = 4 * single
    matrix = {"float64": single / 32, "float32": single, "tf32": 2 * single, "float16": half, "bfloat16": half}
    return Rates(properties.name, 0.85 * memory, matrix, single, _GPU_CALL, "guessed from the device's properties")


@cache
def _cpu(threads: int) -> Rates:
    source = torch.zeros(4 << 20)
    target = torch.empty_like(source)
    matrix = torch.ones(384, 384)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        bandwidth = 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source))
        single = 2 * 384**3 / _fastest(lambda: torch.mm(matrix, matrix))
    rates = {"float64": single / 2, "float32": single, "bfloat16": single / 2, "float16": single / 2}
    name = f"the CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Rates(name, bandwidth, rates, single / 4, 2e-6, "timed for a moment, rough")


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-7)
