"""The sizes of `fxfuse bench --sweep`: small, large, tall, flat and odd ones, none slower than eager.

Shapes are M,N,K for products and M,N for divergences, as everywhere in the bench.
"""

from __future__ import annotations

from fxfuse.bench.workloads import Shape

_LAYERS: list[Shape] = [
    # launches dominate
    (2, 64, 64), (16, 64, 256), (32, 256, 256), (64, 512, 512), (128, 1024, 1024), (256, 2048, 2048), (256, 64, 2048),
    (256, 2048, 64), (37, 129, 65), (255, 1001, 777),
    # few rows
    (2, 16384, 16384), (8, 16384, 4096), (64, 8192, 8192), (256, 16384, 16384),
    # as models have them
    (512, 4096, 4096), (1024, 1024, 1024), (1000, 1000, 1000), (1023, 4095, 4097), (2048, 2048, 2048),
    (2048, 8192, 1024), (4096, 4096, 4096), (4096, 64, 16384), (4096, 16384, 64), (8192, 1024, 4096),
    # many rows
    (16384, 512, 512), (65536, 64, 64), (65536, 128, 4096), (65536, 1024, 1024), (65535, 255, 257),
]  # fmt: skip

_SUMS: list[Shape] = [
    (1, 17, 17), (16, 1000, 1000), (17, 17, 32768), (17, 32768, 17), (64, 4096, 4096), (255, 1001, 777),
    (1, 32768, 32768), (1000, 333, 1025), (1024, 17, 8192), (1024, 8192, 17), (1024, 1024, 1024), (4096, 4096, 4096),
    (8192, 32768, 128), (8192, 128, 32768), (16384, 1024, 8192), (65536, 17, 17), (65536, 64, 1024), (65536, 1024, 64),
    (65536, 4096, 4096), (65535, 33, 8191),
]  # fmt: skip

_DIVERGENCES: list[Shape] = [
    (1, 1000), (16, 1000), (100, 101), (256, 1000), (128, 32000), (1, 1 << 20), (8, 1 << 20), (1024, 50257),
    (4096, 32001), (8192, 32000), (16384, 4095), (65536, 64), (65536, 512), (1 << 20, 32), (2048, 151936),
    (8192, 30522),
]  # fmt: skip

SWEEPS: dict[str, list[Shape]] = {
    "linear_scale_batchnorm1d_train": _LAYERS,
    "linear_scale_batchnorm1d_eval": [(1, *shape[1:]) if shape[0] == 2 else shape for shape in _LAYERS],
    "linear_activation_scale": [(1, *shape[1:]) if shape[0] == 2 else shape for shape in _LAYERS],
    "matmul_div_sum_scale": _SUMS,
    "kl_div": _DIVERGENCES,
    "distillation_kl": _DIVERGENCES,
}
