"""Memory that kernels get for their results and scratch, full of NaN: an element that they forget to write shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import (
    activation_step,
    batchnorm_step,
    gemm,
    half_gemm,
    kl_div,
    linear_activation_scale,
    linear_scale_batchnorm1d,
    matmul_div_sum_scale,
    small_gemm,
)  # fmt: skip


def filled(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        tensor.detach().fill_(math.nan)
    elif tensor.dtype == torch.uint8:
        tensor.fill_(255)
    return tensor


def fill_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, whatever is allocated without being initialised."""
    for place, name in (
        (torch, "empty"), (torch, "empty_like"), (kl_div, "allocate"), (small_gemm, "allocate"),
        (matmul_div_sum_scale, "allocate"), (linear_scale_batchnorm1d, "allocate"),
        (linear_activation_scale, "allocate"), (half_gemm, "allocate"), (gemm, "allocate"),
    ):  # fmt: skip
        allocate = getattr(place, name)

        def poisoned(*args: Any, allocate: Any = allocate, **kwargs: Any) -> Tensor:
            return filled(allocate(*args, **kwargs))

        monkeypatch.setattr(place, name, poisoned)
    for place in (activation_step, batchnorm_step):

        def poisoning(device: int, allocator: Any = place.allocator) -> Any:
            new = allocator(device)
            return lambda *args: filled(new(*args))

        monkeypatch.setattr(place, "allocator", poisoning)
