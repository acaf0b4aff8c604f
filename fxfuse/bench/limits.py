"""What the device can do at most, measured in the same run: bytes a second and matrix operations a second.

The limit of a workload is the larger of its least bytes over the measured bandwidth and its least matrix operations
over the measured matrix rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

from fxfuse.bench.timing import time_together
from fxfuse.bench.workloads import Work

PRECISION_DTYPE = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
PRODUCT = {"cuda": (4096, 8192, 8192), "cpu": (1024, 1024, 1024)}
EMULATED_FP32_PRODUCTS = 6  # bf16 products that together give a float32 product at float32 accuracy


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Inside, float32 products run as `precision` says: "tf32" allows TF32, anything else means IEEE float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Limits:
    """Measured ceilings of one device: `bandwidth` in bytes/s (the better of copy and read), `matrix_rate` in
    operations/s by precision (what torch.mm reaches)."""

    copy_bandwidth: float = 0.0
    read_bandwidth: float = 0.0
    matrix_rate: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        return max(self.copy_bandwidth, self.read_bandwidth)

    def product_rate(self, precision: str, device: torch.device) -> float:
        """Operations/s that a product in `precision` can reach: for float32 on a GPU also by six bf16 products on
        the tensor cores, which are as exact, so that beating the library's float32 is not over 100 %."""
        rate = self.matrix_rate.get(precision, 0.0)
        if precision == "fp32" and device.type == "cuda":
            rate = max(rate, self.matrix_rate.get("bf16", 0.0) / EMULATED_FP32_PRODUCTS)
        return rate

    def milliseconds(self, work: Work, precision: str, device: torch.device) -> float | None:
        """The time below which `work` can't be done on this device; None where a needed ceiling was not measured."""
        if not self.bandwidth:
            return None
        seconds = work.bytes / self.bandwidth
        if work.matrix_ops:
            rate = self.product_rate(precision, device)
            if not rate:
                return None
            seconds = max(seconds, work.matrix_ops / rate)
        return seconds * 1e3

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "bandwidth": self.bandwidth}


def measure_bandwidth(limits: Limits, device: torch.device, rounds: int = 9) -> None:
    """Fill in the copy rate (bytes read plus bytes written) and the read rate (a sum) over a buffer far larger than
    the caches; a smaller one where memory is short."""
    count = COPY_BYTES[device.type] // 4
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 16)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    times = time_together(
        {"copy": lambda i: void(target.copy_(source)), "read": lambda i: void(source.sum())}, device, rounds=rounds
    )
    moved = source.numel() * source.element_size()
    limits.copy_bandwidth = 2 * moved / (times["copy"].median_ms * 1e-3)
    limits.read_bandwidth = moved / (times["read"].median_ms * 1e-3)


def measure_matrix_rate(limits: Limits, device: torch.device, precision: str, rounds: int = 9) -> None:
    """Fill in the rate of torch.mm on random data (zeros run faster than data) in `precision`."""
    m, n, k = PRODUCT[device.type]
    generator = torch.Generator(device).manual_seed(0)
    dtype = PRECISION_DTYPE[precision]
    a = torch.randn(m, k, generator=generator, device=device).to(dtype)
    b = torch.randn(n, k, generator=generator, device=device).to(dtype)
    with matmul_precision(precision):
        times = time_together({"mm": lambda i: void(torch.mm(a, b.t()))}, device, rounds=rounds)
    limits.matrix_rate[precision] = 2 * m * n * k / (times["mm"].median_ms * 1e-3)


def void(_: object) -> None:
    """Drop a value: lets an expression stand where a call returning None is wanted."""
