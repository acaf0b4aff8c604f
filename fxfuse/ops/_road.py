"""The road a call takes, and the questions about tensors that decide it.

`road(*args)` of an op may be asked on fake tensors while a graph is traced, so it reads dtypes, devices, ranks and
layouts, and compares shapes; it does not choose by how large a size is, which would tie a compiled graph to one size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float64, *HALF)


class Road(NamedTuple):
    """How a call is computed.

    name: "kernel" (a CUDA kernel of this package), "closed" (ATen calls in the op's own closed form: fewer passes,
          less memory) or "composed" (the reference itself, with the autograd of its parts).
    why:  one sentence for a person.
    """

    name: str
    why: str

    @property
    def composed(self) -> bool:
        return self.name == "composed"


def floating(*tensors: Tensor | None) -> bool:
    """All are real, dense (strided) floating-point tensors of a dtype the closed forms know. None is skipped."""
    return all(t is None or (t.dtype in FLOATING and t.layout is torch.strided) for t in tensors)


def together(*tensors: Tensor | None) -> bool:
    """All lie on one device, and none is a meta tensor. None is skipped."""
    devices = {t.device for t in tensors if t is not None}
    return len(devices) == 1 and next(iter(devices)).type != "meta"


def plain_memory(*tensors: Tensor | None) -> bool:
    """All may be read through their data pointer: no pending negation. A kernel asks this before it takes a pointer."""
    return all(t is None or not t.is_neg() for t in tensors)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype the closed forms compute in: float64 when any is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
