"""Steps aside: calls whose every fused op would go by eager's own operations run these, and nothing else.

With gradients, a small call on a GPU is bound by the host, where autograd in C++ beats a Python function; each fused op
says so (`Op.direct`) and computes its reference. Where all of a graph's ops have said so, asking them once more only
costs time: the module's own forward is those very operations, and so is the graph as it was captured, with less Python
around them (`straight.py`). Sizes decide, so what was learnt is kept by the arguments' shapes and dtypes, and is asked
again every so often: weights may have changed since. The module's own Python is always right, and the graph is while
what it rests on holds, so nothing here can be wrong, only slow.
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
    """How many more calls of one size step aside until the ops are asked again; and by which straight forward, or None
    for the module's own."""

    __slots__ = ("holds", "left", "run")

    def __init__(self, run: Callable[..., Any] | None, holds: Callable[[Any], bool]) -> None:
        self.left, self.run, self.holds = EVERY, run, holds


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

    def find(self, values: Sequence[Any]) -> Known | None:
        """What is known of this call, where it goes by eager's own operations. Not while a graph is captured, which
        replays without the host."""
        if not self._known or not _grad_enabled() or _is_compiling():
            return None
        if len(values) == 1 and type(x := values[0]) is Tensor:  # nearly every call: `sizes` in fewer steps
            known = self._known.get((x.shape, x.dtype, x.is_cuda))
            if known is None or _dispatch_modes() or _has_torch_function_unary(x):
                return None
        else:
            known = self._known.get(self.sizes(values))
        if known is None or known.left <= 0 or _capturing():
            return None
        known.left -= 1
        return known

    def learn(self, sizes: Hashable, run: Callable[..., Any] | None, holds: Callable[[Any], bool]) -> None:
        """Remember that every op of a call of these sizes went by eager's own operations, and ``run(self, *values)`` in
        which they stand alone, valid while ``holds(self)``."""
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[sizes] = Known(run, holds)
