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

from fxfuse.assume import Source, compile_check

__all__ = ["Aside", "Known", "checked"]

EVERY = 256  # calls until the ops are asked again
MOST = 64  # sizes remembered for a forward

_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_has_torch_function = torch._C._has_torch_function
_has_torch_function_unary = torch._C._has_torch_function_unary
_dispatch_modes = torch._C._len_torch_dispatch_stack
_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def _on_a_gpu(x: Tensor) -> bool:
    return x.is_cuda


class Known:
    """How many more calls of one size step aside until the ops are asked again; and by which straight forward, or None
    for the module's own.

    call: ``call(self, known, x)`` (:func:`checked`), for a forward of one tensor, of this shape and dtype, on this GPU.
    """

    __slots__ = ("call", "device", "dtype", "holds", "left", "run", "shape")
    shape: torch.Size
    dtype: torch.dtype
    device: int

    def __init__(
        self,
        run: Callable[..., Any] | None,
        holds: Callable[[Any], bool],
        call: Callable[..., Any] | None,
    ) -> None:
        self.left, self.run, self.holds, self.call = EVERY, run, holds, call


def checked(run: Callable[..., Any], source: Source) -> Callable[..., Any]:
    """``call(self, known, x)``: what ``run(self, x)`` gives, or NotImplemented where `known` is used up, somebody
    watches (a mode, a graph that is captured), or the module is not as `source` says (`Assumptions.source`).

    One function for all of it: between a forward and its backward Python is cold, and a call of a function costs twice
    what it does in a loop.
    """
    lines, names = source
    return compile_check(
        "self, known, x",
        lines,
        ["known.left -= 1", "return run(self, x)"],
        {
            **names,
            "run": run,
            "dispatch_modes": _dispatch_modes,
            "has_torch_function": _has_torch_function_unary,
            "stream": _stream,
            "capturing": _capturing,
        },
        otherwise=NotImplemented,
        first=[
            "if known.left <= 0 or dispatch_modes() or has_torch_function(x): return OTHERWISE",
            "if stream(known.device) and capturing(): return OTHERWISE",  # the default stream cannot be captured
        ],
    )


class Aside:
    """For which sizes of its arguments one forward steps aside."""

    __slots__ = ("_known", "latest")

    def __init__(self) -> None:
        self._known: dict[Hashable, Known] = {}
        self.latest: Known | None = None  # of those with a `call`

    def sizes(self, values: Sequence[Any]) -> Hashable | None:
        """By what this call is remembered; None for one that is not: without gradients, off the GPU, or watched."""
        if not _grad_enabled() or _is_compiling() or not values or type(values[0]) is not Tensor:
            return None
        if not _on_a_gpu(values[0]) or _dispatch_modes() or _has_torch_function(values):
            return None
        if len(values) == 1:
            return values[0].shape, values[0].dtype, values[0].get_device()
        return tuple([(v.shape, v.dtype) if type(v) is Tensor else type(v) for v in values])

    def find(self, values: Sequence[Any]) -> Known | None:
        """What is known of this call, where it goes by eager's own operations. Not while a graph is captured, which
        replays without the host."""
        if _is_compiling() or not self._known or not _grad_enabled():
            return None
        if len(values) == 1 and type(x := values[0]) is Tensor:  # nearly every call: `sizes` in fewer steps
            known = self._known.get((x.shape, x.dtype, x.get_device()))
            if known is None or _dispatch_modes() or _has_torch_function_unary(x):
                return None
        else:
            known = self._known.get(self.sizes(values))
        if known is None or known.left <= 0 or _capturing():
            return None
        known.left -= 1
        if known.call is not None:
            self.latest = known
        return known

    def learn(
        self,
        sizes: Hashable,
        run: Callable[..., Any] | None,
        holds: Callable[[Any], bool],
        call: Callable[..., Any] | None = None,
    ) -> None:
        """Remember that every op of a call of these sizes went by eager's own operations, and ``run(self, *values)`` in
        which they stand alone, valid while ``holds(self)``; for one tensor also the `call` that is `checked`."""
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[sizes] = known = Known(run, holds, call)
        if call is not None:
            known.shape, known.dtype, known.device = sizes  # type: ignore[misc]
            self.latest = known
