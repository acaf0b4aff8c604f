"""Autocast: its rules as an op has to repeat them, since one op stands where several autocast ops stood.

Source: the lists of ATen's autocast_mode and https://docs.pytorch.org/docs/stable/amp.html. What is needed here:

| inside the unfused code                | CPU                    | CUDA                                     |
|----------------------------------------|------------------------|------------------------------------------|
| linear, matmul, addmm                  | autocast dtype         | autocast dtype                           |
| kl_div                                 | float32                | float32                                  |
| sum, softmax, log_softmax, log         | as the input           | float32                                  |
| mul, div, mean, activations, batch_norm| as the inputs          | as the inputs                            |

float64 and integers are never cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in ("AutocastCUDA", "AutocastXPU", "AutocastMPS", "AutocastMTIA", "AutocastHPU", "AutocastPrivateUse1"):
    if hasattr(torch._C.DispatchKey, _key):
        _AUTOCAST_KEYS = _AUTOCAST_KEYS | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def autocast_off() -> Any:
    """A scope without autocast (`torch.autocast(enabled=False)` for every device, at a tenth of its cost)."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


def device_and_dtype(args: Iterable[Any]) -> tuple[str, torch.dtype | None]:
    """The device type of the first tensor, and autocast's dtype there (None where autocast is off)."""
    for arg in args:
        if isinstance(arg, Tensor):
            device = arg.device.type
            if device == "meta" or not torch.is_autocast_enabled(device):
                return device, None
            return device, torch.get_autocast_dtype(device)
    return "cpu", None


def cast(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    """`tensor` in `dtype`, where autocast would cast it: floating point, not float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
