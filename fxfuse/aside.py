"""Steps aside: calls whose every fused op would go by eager's own operations run these, and nothing else.

With gradients, a small call on a GPU is bound by the host, where autograd in C++ beats a Python function; each fused op
says so (`Op.direct`) and computes its reference. Where all of a graph's ops have said so, asking them once more only
costs time: the module's own forward is those very operations, and so is the graph as it was captured, with less Python
around them (`straight.py`). Sizes decide, so what was learnt is kept by the arguments' shapes and dtypes, and is asked
again every so often: weights may have changed since. Both are always right, so nothing here can be wrong, only slow.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

EVERY = 256  # calls until the ops are asked again
MOST = 64  # sizes remembered for a forward

_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_has_torch_function = torch._C._has_torch_function
_has_torch_function_unary = torch._C._has_torch_function_unary
_dispatch_modes = torch._C._len_torch_dispatch_stack


_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


class Known:
    """What calls of one size run, and how many more until the ops are asked again."""

    __slots__ = ("left", "run")

    def __init__(self, run: Callable[..., Any]) -> None:
        self.left, self.run = EVERY, run


class Aside:
    """For which sizes of its arguments one forward steps aside."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[Hashable, Known] = {}

    def sizes(self, values: Sequence[Any]) -> Hashable | None:
        """By what this call is remembered; None for one that is not: without gradients, off the GPU, or watched."""
        if not _grad_enabled() or _is_compiling() or not values or type(values[0]) is not Tensor:
            return None
        if not values[0].is_cuda or _dispatch_modes() or _has_torch_function(values):
            return None
        if len(values) == 1:
            return values[0].shape, values[0].dtype, True
        return tuple([(v.shape, v.dtype) if type(v) is Tensor else type(v) for v in values])

    def find(self, values: Sequence[Any]) -> Callable[..., Any] | None:
        """What this call runs, ``run(self, *values)``, where it is known to go by eager's own operations. Not while a
        graph is captured, which replays without the host."""
        if not self._known or not _grad_enabled() or _is_compiling():
            return None
        if len(values) == 1 and type(x := values[0]) is Tensor:  # nearly every call: `sizes` in fewer steps
            known = self._known.get((x.shape, x.dtype, x.is_cuda))
            if known is None or _dispatch_modes() or _has_torch_function_unary(x):
                return None
        else:
            known = self._known.get(self.sizes(values))
        if known is None or not known.left or _capturing():
            return None
        known.left -= 1
        return known.run

    def learn(self, sizes: Hashable, run: Callable[..., Any]) -> None:
        """Remember that every op of a call of these sizes went by eager's own operations, which `run` makes."""
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[sizes] = Known(run)
